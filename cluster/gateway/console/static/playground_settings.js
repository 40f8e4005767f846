/** The settings of the playground: model, parameters, tools, schema, and the request as code. */

import { curlOf, pythonOf } from "./chat_request.js";
import { copyButton } from "./copy.js";
import { h, replace, setAttribute, setHidden } from "./dom.js";

const EFFORTS = ["", "none", "minimal", "low", "medium", "high", "xhigh", "max"];
const TOOLS_EXAMPLE = `[{"type": "function", "function": {"name": "weather",
  "description": "The weather of a city",
  "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}}]`;
const SCHEMA_EXAMPLE = '{"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}';

export const DEFAULTS = {
  model: "",
  system: "",
  temperature: "",
  top_p: "",
  max_tokens: "",
  seed: "",
  stop: "",
  reasoning_effort: "",
  tools: "",
  tool_choice: "auto",
  schema: "",
  stream: "yes",
};

/** The form of the settings. `values` are texts, changed as the person types. */
export class Settings {
  /** @param {Record<string, string>} values @param {() => void} onChange */
  constructor(values, onChange) {
    this.values = values;
    this._onChange = onChange;
    /** @type {Record<string, any>} */
    this._inputs = {};
    this._problem = h("p", { class: "problem", role: "alert", hidden: true });
    this._build();
  }

  /** Offer the models. Keeps the chosen one if it is among them. */
  setModels(models) {
    const select = this._inputs.model;
    const options = models.flatMap((model) =>
      [model.id, ...(model.aliases ?? [])].map((name) =>
        h(
          "option",
          { value: name },
          name + (model.state && model.state !== "READY" ? ` (${model.state.toLowerCase()})` : ""),
        ),
      ),
    );
    replace(select, options.length ? options : h("option", { value: "" }, "no model that generates text"));
    const names = models.flatMap((model) => [model.id, ...(model.aliases ?? [])]);
    if (!names.includes(this.values.model)) this.values.model = names[0] ?? "";
    select.value = this.values.model;
    this._onChange();
  }

  /** Show what is wrong with a setting, and focus it; null hides the message. */
  showProblem(error) {
    setHidden(this._problem, !error);
    for (const input of Object.values(this._inputs)) setAttribute(input, "aria-invalid", null);
    if (!error) return;
    this._problem.textContent = error.message;
    const input = this._inputs[error.field];
    setAttribute(input, "aria-invalid", "true");
    input?.closest("details")?.setAttribute("open", "");
    input?.focus();
  }

  _build() {
    this.node = h(
      "section",
      { class: "pg-settings", "aria-label": "Settings" },
      this._problem,
      this._field("model", "Model", "select", {}, []),
      this._field("system", "System prompt", "textarea", { rows: "3" }),
      h(
        "details",
        { class: "pg-group" },
        h("summary", null, "Parameters"),
        h(
          "div",
          { class: "pg-grid" },
          this._field("temperature", "Temperature", "input", { inputmode: "decimal", placeholder: "model's default" }),
          this._field("top_p", "Top p", "input", { inputmode: "decimal", placeholder: "model's default" }),
          this._field("max_tokens", "Max tokens", "input", { inputmode: "numeric", placeholder: "model's default" }),
          this._field("seed", "Seed", "input", { inputmode: "numeric", placeholder: "none" }),
          this._field(
            "reasoning_effort",
            "Reasoning effort",
            "select",
            {},
            EFFORTS.map((name) => [name, name || "model's default"]),
          ),
          this._field("stream", "Streaming", "select", {}, [
            ["yes", "yes"],
            ["no", "no"],
          ]),
        ),
        this._field("stop", "Stop strings, one a line", "textarea", { rows: "2" }),
      ),
      h(
        "details",
        { class: "pg-group" },
        h("summary", null, "Tools"),
        this._field("tools", "Tools as JSON", "textarea", { rows: "6", placeholder: TOOLS_EXAMPLE, class: "pg-code" }),
        this._field("tool_choice", "Tool choice", "select", {}, [
          ["auto", "auto"],
          ["required", "required"],
          ["none", "none"],
        ]),
      ),
      h(
        "details",
        { class: "pg-group" },
        h("summary", null, "JSON schema"),
        this._field("schema", "Schema of the answer", "textarea", {
          rows: "6",
          placeholder: SCHEMA_EXAMPLE,
          class: "pg-code",
        }),
      ),
    );
  }

  _field(name, label, tag, attributes, options = null) {
    const id = `pg-${name}`;
    const children = options ? options.map(([value, text]) => h("option", { value }, text)) : [];
    const input = h(tag, { id, autocomplete: "off", spellcheck: "false", ...attributes }, children);
    input.value = this.values[name];
    input.addEventListener("input", () => {
      this.values[name] = input.value;
      this._onChange();
    });
    this._inputs[name] = input;
    return h("div", { class: "field" }, h("label", { htmlFor: id }, label), input);
  }
}

/** The request that would be sent next, as code. It is made when it is looked at. */
export class CodeView {
  /** @param {() => any} body may raise SettingError @param {boolean} hasKeys */
  constructor(body, hasKeys) {
    this._body = body;
    this._hasKeys = hasKeys;
    this._make = curlOf;
    this._timer = 0;
    this._code = h("code");
    this._buttons = [this._choice("curl", curlOf), this._choice("Python", pythonOf)];
    const bar = h(
      "div",
      { class: "pg-code-bar" },
      this._buttons,
      copyButton(() => this._code.textContent),
    );
    const hint = hasKeys
      ? h("p", { class: "hint" }, "Set HEADRACE_API_KEY to your key. The console does not know it.")
      : null;
    this.node = h(
      "details",
      { class: "pg-group", on: { toggle: () => this._show() } },
      h("summary", null, "This request as code"),
      bar,
      h("pre", { tabindex: "0", role: "group", "aria-label": "Code" }, this._code),
      hint,
    );
  }

  /** Show changed settings, half a second later: a person types. */
  update() {
    if (!this.node.open) return;
    clearTimeout(this._timer);
    this._timer = setTimeout(() => this._show(), 500);
  }

  close() {
    clearTimeout(this._timer);
  }

  _choice(label, make) {
    const choice = h(
      "button",
      { type: "button", class: "button quiet", "aria-pressed": String(make === this._make) },
      label,
    );
    choice.addEventListener("click", () => {
      this._make = make;
      for (const other of this._buttons) setAttribute(other, "aria-pressed", String(other === choice));
      this._show();
    });
    return choice;
  }

  _show() {
    if (!this.node.open) return;
    try {
      this._code.textContent = this._make(this._body(), location.origin, this._hasKeys);
    } catch (error) {
      this._code.textContent = error.message;
    }
  }
}
