/** The playground: a chat on the gateway's API as the signed-in person. Nothing of it is stored. */

import { bodyOf, SettingError } from "./chat_request.js";
import { Answer, Conversation } from "./conversation.js";
import { announce, button, h, setHidden } from "./dom.js";
import { count } from "./format.js";
import { AnswerView, questionNode } from "./playground_messages.js";
import { CodeView, DEFAULTS, Settings } from "./playground_settings.js";

await styleSheet("/console/static/playground.css");

const CHECK_MS = 2000;

/** The conversation goes on while its person looks at other pages. It is forgotten when its session has ended. */
let kept = { owner: "", conversation: null, timer: 0 };

function ownerOf(session) {
  return session?.signed_in ? `${session.actor} ${session.tenant} ${session.csrf}` : "";
}

function forget() {
  clearInterval(kept.timer);
  kept.conversation?.clear();
  kept = { owner: "", conversation: null, timer: 0 };
}

function conversationOf(api) {
  const owner = ownerOf(api.session);
  if (kept.owner === owner && kept.conversation) return kept.conversation;
  forget();
  const conversation = new Conversation(() => api.session?.csrf ?? "");
  conversation.settings = { ...DEFAULTS };
  const timer = setInterval(() => ownerOf(api.session) === owner || forget(), CHECK_MS);
  kept = { owner, conversation, timer };
  return conversation;
}

/** Show the playground in a container. */
export function mount(container, context, route) {
  return new Playground(container, context, route);
}

class Playground {
  constructor(container, { api, feed }, route) {
    this._api = api;
    this._conversation = conversationOf(api);
    const model = route?.query?.get("model");
    if (model) this._conversation.settings.model = model;
    this._feed = feed;
    this._views = new Map();
    this._isAtEnd = true;
    this._build(container);
    this._conversation.onEntries = () => this._showEntries();
    this._unsubscribe = feed?.subscribe(() => this._showCalls()) ?? (() => {});
    this._showEntries();
    void this._loadModels();
  }

  unmount() {
    this._unsubscribe();
    this._conversation.onEntries = () => {};
    for (const view of this._views.values()) view.close?.();
    this._code.close();
  }

  _build(container) {
    this._settings = new Settings(this._conversation.settings, () => this._code?.update());
    this._code = new CodeView(
      () => bodyOf(this._conversation.settings, this._conversation.messages(this._text.value)),
      this._api.session.auth,
    );
    this._settings.node.append(this._code.node);
    this._empty = h(
      "p",
      { class: "pg-empty" },
      "Ask something. The conversation is kept in this page only: when it is closed, it is gone.",
    );
    this._log = h(
      "div",
      { class: "pg-log", role: "log", "aria-live": "off", "aria-label": "Conversation", tabindex: "0" },
      this._empty,
    );
    this._log.addEventListener("scroll", () => {
      this._isAtEnd = this._log.scrollHeight - this._log.scrollTop - this._log.clientHeight < 40;
    });
    this._text = h("textarea", {
      id: "pg-message",
      rows: "3",
      value: this._conversation.draft,
      "aria-describedby": "pg-keys",
    });
    this._text.addEventListener("input", () => {
      this._conversation.draft = this._text.value;
      this._code.update();
    });
    this._text.addEventListener("keydown", (event) => {
      if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
        event.preventDefault();
        this._send();
      }
    });
    this._sendButton = h("button", { type: "submit", class: "button primary" }, "Send");
    this._stopButton = button("Stop", () => this._stop(), { kind: "danger" });
    this._againButton = button("Try again", () =>
      this._attempt(() => this._conversation.tryAgain(this._settings.values)),
    );
    this._clearButton = button("Clear", () => this._clear());
    const form = h(
      "form",
      { class: "pg-compose", novalidate: true },
      h("label", { htmlFor: "pg-message" }, "Message"),
      this._text,
      h(
        "div",
        { class: "pg-buttons" },
        this._sendButton,
        this._stopButton,
        this._againButton,
        this._clearButton,
        h("span", { class: "hint", id: "pg-keys" }, "Enter sends, Shift+Enter begins a line"),
      ),
    );
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      this._send();
    });
    container.append(
      h("h1", { tabindex: "-1" }, "Playground"),
      h("div", { class: "pg" }, h("div", { class: "pg-chat" }, this._log, form), this._settings.node),
    );
  }

  async _loadModels() {
    try {
      const models = await this._api.get("/console/v1/models");
      this._settings.setModels(models.data.filter((model) => !model.tasks?.length || model.tasks.includes("generate")));
    } catch (error) {
      this._settings.showProblem(new SettingError("model", `The models cannot be read: ${error.message}`));
    }
  }

  _send() {
    const text = this._text.value;
    if (!text.trim() || this._conversation.isRunning) return;
    this._attempt(() => {
      const asked = this._conversation.ask(text, this._settings.values);
      this._conversation.draft = this._text.value = "";
      return asked;
    });
  }

  /** Begin a request, and show a setting that prevents it. */
  async _attempt(begin) {
    this._isAtEnd = true;
    try {
      const running = this._run(begin);
      this._settings.showProblem(null);
      await running;
    } catch (error) {
      if (!(error instanceof SettingError)) throw error;
      this._settings.showProblem(error);
    }
  }

  async _run(begin) {
    const running = begin();
    announce("The question is sent");
    await running;
    const last = this._conversation.entries.at(-1);
    if (!(last instanceof Answer)) return;
    announce(
      last.state === "ended"
        ? `The answer is complete: ${count(last.times.tokens)} tokens`
        : `The answer is ${last.state}`,
    );
  }

  _stop() {
    this._conversation.stop();
    this._text.focus();
  }

  _clear() {
    this._conversation.clear();
    this._text.focus();
  }

  _showEntries() {
    const { entries, isRunning } = this._conversation;
    for (const [entry, view] of this._views) {
      if (entries.includes(entry)) continue;
      view.close?.();
      view.node.remove();
      this._views.delete(entry);
    }
    for (const entry of entries) {
      if (this._views.has(entry)) continue;
      const view =
        entry instanceof Answer ? new AnswerView(entry, this._answerContext()) : { node: questionNode(entry) };
      this._views.set(entry, view);
      this._log.append(view.node);
    }
    setHidden(this._empty, entries.length > 0);
    setHidden(this._sendButton, isRunning);
    setHidden(this._stopButton, !isRunning);
    setHidden(this._againButton, isRunning || !(entries.at(-1) instanceof Answer));
    setHidden(this._clearButton, entries.length === 0);
    this._code.update();
    this._scroll();
  }

  _answerContext() {
    return {
      onResults: () => this._attempt(() => this._conversation.goOn(this._settings.values)),
      onShown: () => this._scroll(),
      findCall: (id) => this._feed?.lists.calls.get(id),
    };
  }

  _showCalls() {
    for (const view of this._views.values()) view.showCall?.();
  }

  /** Follow the answer, unless the person has scrolled back. */
  _scroll() {
    if (this._isAtEnd) this._log.scrollTop = this._log.scrollHeight;
  }
}

async function styleSheet(href) {
  const link = h("link", { rel: "stylesheet", href });
  const loaded = new Promise((resolve) => {
    link.addEventListener("load", resolve);
    link.addEventListener("error", resolve);
  });
  document.head.append(link);
  await loaded;
}
