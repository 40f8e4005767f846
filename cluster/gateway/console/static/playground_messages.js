/** How the questions and answers of the playground look. Text of models is Markdown, or text; it is never HTML. */

import { copyButton } from "./copy.js";
import { button, h, setHidden, setText } from "./dom.js";
import { count, duration } from "./format.js";
import { MarkdownView } from "./markdown.js";

const FINISHES = {
  stop: "",
  length: "max tokens reached",
  tool_calls: "waits for results of tools",
  content_filter: "ended by a guard",
  error: "ended by an error",
};

/** @param {import("./conversation.js").Question} question */
export function questionNode(question) {
  return h(
    "article",
    { class: "pg-message pg-question" },
    h("h2", { class: "pg-who" }, "You"),
    h("div", { class: "pg-text" }, question.text),
  );
}

/** Shows an answer while it arrives. */
export class AnswerView {
  /**
   * @param {import("./conversation.js").Answer} answer
   * @param {{onResults: () => void, onShown: () => void, findCall: (id: string) => any}} context
   */
  constructor(answer, context) {
    this._answer = answer;
    this._context = context;
    this._frame = 0;
    this._shown = { text: 0, reasoning: 0 };
    this._isFinished = false;
    this._calls = [];
    this._build();
    answer.onChange = () => this._schedule();
    this._show();
  }

  close() {
    this._answer.onChange = () => {};
    cancelAnimationFrame(this._frame);
    clearTimeout(this._frame);
  }

  /** Show what the overview says of the call: whether it waits, and whether it goes on at another worker. */
  showCall() {
    const call = this._answer.id ? this._context.findCall(this._answer.id) : null;
    if (!call) return;
    const isResuming = call.state === "resuming" && this._answer.state === "running";
    const resumed = call.resumes > 1 ? `Resumed ${call.resumes} times on other workers` : "Resumed on another worker";
    let words = call.resumes > 0 ? `${resumed}: the worker was lost.` : "";
    if (isResuming) words = "The worker was lost. The answer resumes on another worker.";
    setText(this._resumes, words);
    setHidden(this._resumes, !this._resumes.textContent);
  }

  _build() {
    const model = this._answer.model;
    this._reasoningText = document.createTextNode("");
    this._reasoning = h(
      "details",
      { class: "pg-reasoning", hidden: true },
      h("summary", null, "Reasoning"),
      h("div", { class: "pg-text" }, this._reasoningText),
    );
    const text = h("div");
    this._markdown = new MarkdownView(text);
    this._tools = h("div", { class: "pg-tools" });
    this._wait = h("p", { class: "pg-wait" }, "Waiting for the first token");
    this._resumes = h("p", { class: "pg-resumes", hidden: true });
    this._error = h("div", { class: "problem", role: "alert", hidden: true });
    this._facts = h("p", { class: "pg-facts" });
    this._link = h("a", { class: "pg-link", hidden: true }, "Details of the call");
    const copy = copyButton(() => this._answer.text, "Copy answer");
    this._foot = h("div", { class: "pg-foot", hidden: true }, this._facts, this._link, copy);
    this.node = h(
      "article",
      { class: "pg-message pg-answer", "aria-busy": "true" },
      h("h2", { class: "pg-who" }, model || "Model"),
      this._reasoning,
      text,
      this._tools,
      this._wait,
      this._resumes,
      this._error,
      this._foot,
    );
  }

  /** Several events within a frame are shown together. A page in the background has no frames. */
  _schedule() {
    if (this._frame) return;
    const show = () => {
      this._frame = 0;
      this._show();
      this._context.onShown();
    };
    this._frame = document.hidden ? setTimeout(show, 250) : requestAnimationFrame(show);
  }

  _show() {
    const answer = this._answer;
    if (answer.text.length > this._shown.text) this._markdown.append(answer.text.slice(this._shown.text));
    if (answer.reasoning.length > this._shown.reasoning)
      this._reasoningText.appendData(answer.reasoning.slice(this._shown.reasoning));
    this._shown = { text: answer.text.length, reasoning: answer.reasoning.length };
    setHidden(this._reasoning, !answer.reasoning);
    this._showToolCalls();
    const isWaiting = answer.state === "running" && !answer.times.firstAt;
    setHidden(this._wait, !isWaiting);
    if (isWaiting) setText(this._wait, answer.note ? `Waiting: ${answer.note}` : "Waiting for the first token");
    this._showFacts();
    this.showCall();
    if (answer.state !== "running" && !this._isFinished) this._finish();
  }

  _showFacts() {
    const { times, state, finishReason } = this._answer;
    const facts = [];
    if (times.ttftS !== null) facts.push(`first token after ${duration(times.ttftS)}`);
    if (times.rate !== null) facts.push(`${times.isExact ? "" : "about "}${count(times.rate, 1)} tokens/s`);
    if (times.tokens) facts.push(`${times.isExact ? "" : "about "}${count(times.tokens)} tokens`);
    const prompt = times.usage?.prompt_tokens;
    const cached = times.usage?.prompt_tokens_details?.cached_tokens;
    if (prompt) facts.push(`${count(prompt)} of the prompt${cached ? `, ${count(cached)} cached` : ""}`);
    if (state === "stopped") facts.push("stopped by you");
    const finish = FINISHES[finishReason] ?? finishReason;
    if (state !== "running" && finish) facts.push(finish);
    setText(this._facts, facts.join(" · "));
    setHidden(this._foot, !facts.length);
  }

  _showToolCalls() {
    for (const call of this._answer.toolCalls) {
      if (!call) continue;
      const index = this._answer.toolCalls.indexOf(call);
      const view = (this._calls[index] ??= this._addToolCall(call));
      setText(view.name, call.name);
      if (call.arguments.length > view.shown) view.text.appendData(call.arguments.slice(view.shown));
      view.shown = call.arguments.length;
    }
  }

  _addToolCall(call) {
    const name = h("code");
    const text = document.createTextNode("");
    const pre = h("pre", { tabindex: "0", "aria-label": "Arguments", role: "group" }, h("code", null, text));
    const node = h("div", { class: "pg-tool" }, h("p", null, "Calls ", name), pre);
    this._tools.append(node);
    return { name, text, shown: 0, node, call };
  }

  _finish() {
    const answer = this._answer;
    this._isFinished = true;
    this._markdown.finish();
    this.node.setAttribute("aria-busy", "false");
    if (answer.id && answer.state !== "failed") {
      this._link.href = `#/calls/${encodeURIComponent(answer.id)}`;
      this._link.hidden = false;
    }
    for (const view of this._calls) view.text.data = indented(view.call.arguments);
    if (answer.needsResults) this._askForResults();
    if (answer.error) this._showError(answer.error);
  }

  _askForResults() {
    this._calls.forEach((view, index) => {
      const id = `pg-result-${performance.now()}-${index}`;
      const area = h("textarea", { id, rows: "3", value: view.call.result, spellcheck: "false" });
      area.addEventListener("input", () => {
        view.call.result = area.value;
      });
      view.node.append(h("label", { htmlFor: id }, `Result of ${view.call.name}`), area);
    });
    const send = button(
      "Send the results",
      () => {
        send.remove();
        this._context.onResults();
      },
      { kind: "primary" },
    );
    this._tools.append(send);
  }

  _showError(error) {
    const facts = [
      error.code && `code ${error.code}`,
      error.param && `field ${error.param}`,
      error.status && `HTTP ${error.status}`,
      error.retryS && `try again in ${error.retryS} s`,
      error.requestId && `request ${error.requestId}`,
    ].filter(Boolean);
    this._error.append(h("p", null, error.message), h("p", { class: "pg-facts" }, facts.join(" · ")));
    this._error.hidden = false;
  }
}

/** Return JSON with line breaks; another text as it is. */
function indented(text) {
  try {
    return JSON.stringify(JSON.parse(text), null, 2);
  } catch {
    return text;
  }
}
