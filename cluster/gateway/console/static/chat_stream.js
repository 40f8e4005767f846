/** A streamed chat: its request, its server-sent events, and its counts and times. */

/** A chat that the gateway refused or that failed. `text` and `code` are the API's own. */
export class ChatError extends Error {
  /**
   * @param {string} message
   * @param {{code?: string, param?: string, status?: number, requestId?: string, retryS?: string}} [facts]
   */
  constructor(message, { code = "", param = "", status = 0, requestId = "", retryS = "" } = {}) {
    super(message);
    this.code = code;
    this.param = param;
    this.status = status;
    this.requestId = requestId;
    this.retryS = retryS;
  }
}

/**
 * Send a chat, and call `on` for each event of the answer. Ends with the answer, or raises ChatError, or AbortError
 * after `signal` was aborted.
 * @param {{csrf: string, body: any, signal: AbortSignal, onEvent: (event: any) => void,
 *   onComment: (text: string) => void}} options
 * @returns {Promise<{requestId: string}>}
 */
export async function streamChat({ csrf, body, signal, onEvent, onComment }) {
  let response;
  try {
    response = await fetch("/console/v1/chat/completions", {
      method: "POST",
      headers: { "content-type": "application/json", ...(csrf && { "x-csrf-token": csrf }) },
      body: JSON.stringify(body),
      credentials: "same-origin",
      cache: "no-store",
      signal,
    });
  } catch (error) {
    if (signal.aborted) throw error;
    throw new ChatError("No gateway answers. Check the connection and try again.");
  }
  const requestId = response.headers.get("x-request-id") ?? "";
  if (!response.ok) throw await refusal(response, requestId);
  if (!body.stream) {
    onEvent(await response.json());
    return { requestId };
  }
  let isDone = false;
  const parser = new EventParser((data) => {
    if (data === "[DONE]") {
      isDone = true;
      return;
    }
    const event = JSON.parse(data);
    if (event.error) throw errorOf(event.error, { requestId });
    onEvent(event);
  }, onComment);
  try {
    await readAll(response.body, parser);
  } catch (error) {
    if (signal.aborted || error instanceof ChatError) throw error;
    throw new ChatError(`The connection to the gateway broke: ${error.message}`, { requestId });
  }
  if (!isDone) throw new ChatError("The connection to the gateway ended before the answer did.", { requestId });
  return { requestId };
}

async function readAll(stream, parser) {
  const reader = stream.getReader();
  const decoder = new TextDecoder();
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      parser.push(decoder.decode(value, { stream: true }));
    }
  } finally {
    reader.cancel().catch(() => {}); // an answer of which no more is read ends its request
  }
}

async function refusal(response, requestId) {
  const status = response.status;
  const retryS = response.headers.get("retry-after") ?? "";
  try {
    return errorOf((await response.json()).error, { status, requestId, retryS });
  } catch {
    return new ChatError(`The gateway refused the request (HTTP ${status}).`, { status, requestId, retryS });
  }
}

function errorOf(error, facts) {
  return new ChatError(String(error.message), {
    ...facts,
    code: String(error.code ?? ""),
    param: String(error.param ?? ""),
  });
}

/** Splits a text that arrives in pieces into server-sent events. Time is linear in the text's length. */
export class EventParser {
  /** @param {(data: string) => void} onData @param {(text: string) => void} onComment */
  constructor(onData, onComment) {
    this._onData = onData;
    this._onComment = onComment;
    this._parts = []; // of a line whose end has not arrived
    this._data = [];
  }

  /** @param {string} text */
  push(text) {
    const lines = text.split("\n");
    if (lines.length === 1) return void this._parts.push(text);
    lines[0] = this._parts.join("") + lines[0];
    this._parts = [lines.pop()];
    for (const line of lines) this._line(line.endsWith("\r") ? line.slice(0, -1) : line);
  }

  _line(line) {
    if (line.startsWith("data:")) {
      this._data.push(line.slice(line[5] === " " ? 6 : 5));
    } else if (line.startsWith(":")) {
      this._onComment(line.slice(1).trim());
    } else if (line === "" && this._data.length) {
      const data = this._data.join("\n");
      this._data = [];
      this._onData(data);
    }
  }
}

/** Counts the tokens of an answer: one for each event, until the usage at the end has the exact number. */
export class AnswerTimes {
  /** @param {number} now in milliseconds, as all times here */
  constructor(now) {
    this.startedAt = now;
    this.firstAt = 0;
    this.lastAt = now;
    this.events = 0;
    this.usage = null;
  }

  countEvent(now) {
    this.firstAt ||= now;
    this.lastAt = now;
    this.events += 1;
  }

  get isExact() {
    return this.usage !== null;
  }

  get tokens() {
    return this.usage?.completion_tokens ?? this.events;
  }

  /** Seconds until the first token; null before it. */
  get ttftS() {
    return this.firstAt ? (this.firstAt - this.startedAt) / 1000 : null;
  }

  /** Tokens a second after the first; null with fewer than two tokens. */
  get rate() {
    const seconds = (this.lastAt - this.firstAt) / 1000;
    return this.tokens > 1 && seconds > 0.02 ? (this.tokens - 1) / seconds : null;
  }
}
