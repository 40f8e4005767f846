/** Dialogs that ask before something is changed, and short messages about what was done. */

import { announce, button, h, replace } from "./dom.js";

/**
 * @typedef {object} Field
 * @property {string} name
 * @property {string} label
 * @property {"text" | "number" | "select" | "radio" | "checkbox"} [type]
 * @property {boolean} [isRequired]
 * @property {any} [value]
 * @property {[string, string][]} [options] value and label
 * @property {string} [hint]
 * @property {Record<string, any>} [attributes] of the input
 */

/**
 * Ask in a dialog, and do what was asked for. An error is shown in the dialog, which stays open.
 * @template T
 * @param {{title: string, text?: string | Node, fields?: Field[], confirm: string, isDanger?: boolean,
 *   act: (values: Record<string, any>) => Promise<T>}} options
 * @returns {Promise<T | null>} null if it was cancelled
 */
export function confirmDialog({ title, text = "", fields = [], confirm, isDanger = false, act }) {
  return new Promise((resolve) => {
    let result = null;
    const inputs = fields.map(fieldOf);
    const problem = h("p", { class: "problem", role: "alert", hidden: true });
    const yes = h("button", { type: "submit", class: `button ${isDanger ? "danger" : "primary"}` }, confirm);
    const no = button("Cancel", () => dialog.close());
    const form = h(
      "form",
      { method: "dialog", novalidate: true },
      h("h2", { id: "dialog-title" }, title),
      text && (text instanceof Node ? text : h("p", null, text)),
      inputs.map((input) => input.node),
      problem,
      h("div", { class: "dialog-buttons" }, no, yes),
    );
    const dialog = h("dialog", { class: "dialog", "aria-labelledby": "dialog-title" }, form);
    const fail = (message, input) => {
      problem.hidden = false;
      problem.textContent = message;
      (input ?? inputs[0])?.focus?.();
    };
    form.addEventListener("submit", async (event) => {
      event.preventDefault();
      const lacking = inputs.find((input) => input.field.isRequired && !String(input.value()).trim());
      if (lacking) return void fail(`${lacking.field.label}: enter a value.`, lacking);
      yes.disabled = true;
      try {
        result = await act(Object.fromEntries(inputs.map((input) => [input.field.name, input.value()])));
        dialog.close();
      } catch (error) {
        fail(
          error.message,
          inputs.find((input) => input.field.name === error.field),
        );
      } finally {
        yes.disabled = false;
      }
    });
    show(dialog, () => resolve(result));
    (inputs[0] ?? (isDanger ? { focus: () => no.focus() } : { focus: () => yes.focus() })).focus();
  });
}

/** Show a dialog with content of the caller's own and one button that closes it. */
export function showDialog(title, close, ...content) {
  const done = button(close, () => dialog.close(), { kind: "primary" });
  const dialog = h(
    "dialog",
    { class: "dialog", "aria-labelledby": "dialog-title" },
    h("h2", { id: "dialog-title" }, title),
    content,
    h("div", { class: "dialog-buttons" }, done),
  );
  return new Promise((resolve) => show(dialog, resolve));
}

function show(dialog, onClose) {
  const before = document.activeElement;
  dialog.addEventListener("close", () => {
    dialog.remove();
    if (before?.isConnected) before.focus();
    onClose();
  });
  document.body.append(dialog);
  dialog.showModal();
}

let fieldNumber = 0;

/** @param {Field} field */
function fieldOf(field) {
  const id = `field-${(fieldNumber += 1)}`;
  const hint = field.hint ? h("p", { class: "hint", id: `${id}-hint` }, field.hint) : null;
  const common = {
    id,
    name: field.name,
    "aria-describedby": hint && hint.id,
    required: field.isRequired,
    ...field.attributes,
  };
  if (field.type === "radio") return radioOf(field, id, hint);
  let input;
  if (field.type === "select") {
    const options = field.options.map(([value, label]) => h("option", { value }, label));
    input = h("select", common, options);
    input.value = field.value ?? field.options[0][0];
  } else if (field.type === "checkbox") {
    input = h("input", { ...common, type: "checkbox", checked: Boolean(field.value) });
    const node = h("div", { class: "field check" }, h("label", { htmlFor: id }, input, " ", field.label), hint);
    return { field, node, value: () => input.checked, focus: () => input.focus() };
  } else {
    input = h("input", { ...common, type: field.type ?? "text", autocomplete: "off", value: field.value ?? "" });
  }
  const label = h(
    "label",
    { htmlFor: id },
    field.label,
    field.isRequired ? null : h("span", { class: "optional" }, " (optional)"),
  );
  return {
    field,
    node: h("div", { class: "field" }, label, input, hint),
    value: () => input.value,
    focus: () => input.focus(),
  };
}

function radioOf(field, id, hint) {
  const inputs = field.options.map(([value]) =>
    h("input", { type: "radio", name: id, value, checked: value === (field.value ?? field.options[0][0]) }),
  );
  const labels = field.options.map(([, label], index) => h("label", { class: "radio" }, inputs[index], " ", label));
  return {
    field,
    node: h("fieldset", { class: "field" }, h("legend", null, field.label), labels, hint),
    value: () => inputs.find((input) => input.checked)?.value ?? "",
    focus: () => (inputs.find((input) => input.checked) ?? inputs[0]).focus(),
  };
}

let shelf = null;

/** Show a message for some seconds, and have it read out. */
export function showMessage(words) {
  shelf ??= document.body.appendChild(h("section", { class: "messages", "aria-label": "Messages" }));
  const node = h("p", { class: "message" }, words);
  shelf.append(node);
  setTimeout(() => node.remove(), 6000);
  announce(words);
}

/** Put an error in place of a part of the page, with a button that tries again. */
export function showError(container, error, retry) {
  replace(container, h("div", { class: "problem" }, h("p", null, error.message), retry && button("Try again", retry)));
}
