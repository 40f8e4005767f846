/** The conversation of the playground: what was asked and answered. It lives in the page's memory only. */

import { bodyOf } from "./chat_request.js";
import { AnswerTimes, ChatError, streamChat } from "./chat_stream.js";

/**
 * @typedef {object} ToolCall
 * @property {string} id
 * @property {string} name
 * @property {string} arguments
 * @property {string} result typed by the person
 */

/** A message of a person. */
export class Question {
  constructor(text) {
    this.text = text;
  }

  messages() {
    return [{ role: "user", content: this.text }];
  }
}

/** An answer of a model, while it arrives and after. `onChange` is called for each change. */
export class Answer {
  constructor(model, now) {
    this.model = model;
    this.text = "";
    this.reasoning = "";
    /** @type {ToolCall[]} */
    this.toolCalls = [];
    this.times = new AnswerTimes(now);
    this.id = "";
    this.requestId = "";
    this.finishReason = "";
    this.note = ""; // what the gateway says while the answer waits
    /** @type {ChatError | null} */
    this.error = null;
    this.state = "running"; // running, ended, stopped or failed
    this.onChange = () => {};
  }

  /** Add an event of the stream, or a whole answer, which has messages in place of deltas. */
  add(event, now) {
    this.id = event.id ?? this.id;
    if (event.usage) this.times.usage = event.usage;
    for (const choice of event.choices ?? []) {
      const part = choice.delta ?? choice.message ?? {};
      if (choice.finish_reason) this.finishReason = choice.finish_reason;
      const reasoning = part.reasoning_content ?? part.reasoning ?? "";
      this.reasoning += reasoning;
      this.text += part.content ?? "";
      for (const call of part.tool_calls ?? []) this._addToolCall(call);
      if (part.content || reasoning || part.tool_calls) this.times.countEvent(now);
    }
    this.note = "";
    this.onChange();
  }

  _addToolCall(call) {
    const index = call.index ?? this.toolCalls.length;
    const shown = (this.toolCalls[index] ??= { id: "", name: "", arguments: "", result: "" });
    shown.id = call.id ?? shown.id;
    shown.name = call.function?.name || shown.name;
    shown.arguments += call.function?.arguments ?? "";
  }

  /** Whether the model waits for results of tools. */
  get needsResults() {
    return this.state === "ended" && this.toolCalls.length > 0;
  }

  messages() {
    if (!this.text && !this.toolCalls.length) return [];
    const message = { role: "assistant", content: this.text || null };
    if (!this.toolCalls.length) return [message];
    const calls = this.toolCalls.map(({ id, name, arguments: given }) => ({
      id,
      type: "function",
      function: { name, arguments: given },
    }));
    const results = this.toolCalls.map(({ id, result }) => ({ role: "tool", tool_call_id: id, content: result }));
    return [{ ...message, tool_calls: calls }, ...results];
  }
}

/** The questions and answers, and the request that runs. */
export class Conversation {
  /** @param {() => string} csrf */
  constructor(csrf) {
    this._csrf = csrf;
    /** @type {(Question | Answer)[]} */
    this.entries = [];
    this.settings = null;
    this.draft = "";
    this.onEntries = () => {};
    this._abort = null;
  }

  get isRunning() {
    return this._abort !== null;
  }

  /** The messages of the API so far. `text`: a question that is not asked yet. */
  messages(text = "") {
    const asked = text ? [new Question(text)] : [];
    return [...this.entries, ...asked].flatMap((entry) => entry.messages());
  }

  /** Ask a question. Raises SettingError before anything changes. */
  ask(text, settings) {
    const body = bodyOf(settings, this.messages(text));
    this.entries.push(new Question(text));
    return this._run(body);
  }

  /** Have the model go on after results of tools. Raises SettingError. */
  goOn(settings) {
    return this._run(bodyOf(settings, this.messages()));
  }

  /** Ask the last question again, in place of its answer. Raises SettingError. */
  tryAgain(settings) {
    const at = this.entries.findLastIndex((entry) => entry instanceof Answer);
    if (at < 0) return Promise.resolve();
    const messages = this.entries.slice(0, at).flatMap((entry) => entry.messages());
    const body = bodyOf(settings, messages);
    this.entries.length = at;
    return this._run(body);
  }

  stop() {
    this._abort?.abort();
  }

  clear() {
    this.stop();
    this.entries = [];
    this.onEntries();
  }

  async _run(body) {
    this.stop();
    const abort = new AbortController();
    const answer = new Answer(body.model, performance.now());
    this._abort = abort;
    this.entries.push(answer);
    this.onEntries();
    try {
      const onEvent = (event) => answer.add(event, performance.now());
      const onComment = (text) => {
        answer.note = text === "keep-alive" ? "" : text;
        answer.onChange();
      };
      answer.requestId = (
        await streamChat({ csrf: this._csrf(), body, signal: abort.signal, onEvent, onComment })
      ).requestId;
      answer.state = "ended";
    } catch (error) {
      answer.state = abort.signal.aborted ? "stopped" : "failed";
      if (!abort.signal.aborted) answer.error = error instanceof ChatError ? error : new ChatError(error.message);
    }
    if (this._abort === abort) this._abort = null;
    answer.onChange();
    this.onEntries();
  }
}
