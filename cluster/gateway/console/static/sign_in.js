/** The sign-in page: an API key, or the organisation's OpenID provider. The key is sent once and kept nowhere. */

import { h } from "./dom.js";
import { themePicker } from "./theme_picker.js";

/**
 * @param {import("./api.js").Api} api
 * @param {import("./api.js").Session} session
 * @param {string} notice shown above the form
 * @param {() => void} onSignedIn
 */
export function signInPage(api, session, notice, onSignedIn) {
  const key = h("input", {
    id: "key",
    name: "key",
    type: "password",
    autocomplete: "off",
    spellcheck: "false",
    required: true,
    "aria-describedby": "key-hint",
    placeholder: "hr_…",
  });
  const problem = h("p", { class: "problem", role: "alert", hidden: true });
  const submit = h("button", { type: "submit", class: "button primary wide" }, "Sign in");
  const form = h(
    "form",
    { class: "sign-in-form", novalidate: true, on: { submit: (event) => void send(event) } },
    h("label", { htmlFor: "key" }, "API key"),
    key,
    h("p", { class: "hint", id: "key-hint" }, "It is sent once to this gateway and is not stored in the browser."),
    problem,
    submit,
  );
  const oidc = h("a", { class: "button wide", href: "/console/sign-in/oidc" }, "Sign in with your organisation");
  setTimeout(() => (session.sign_in.key ? key : oidc).focus());

  async function send(event) {
    event.preventDefault();
    problem.hidden = true;
    if (!key.value.trim()) return fail("Enter an API key.");
    submit.disabled = true;
    try {
      await api.post("/console/sign-in", { key: key.value.trim() });
      key.value = "";
      onSignedIn();
    } catch (error) {
      fail(error.message);
    } finally {
      submit.disabled = false;
    }
  }

  function fail(message) {
    problem.hidden = false;
    problem.textContent = message;
    key.select();
    key.focus();
  }

  return h(
    "main",
    { class: "alone sign-in" },
    h("div", { class: "brand large" }, h("span", { class: "mark", "aria-hidden": "true" }), "Headrace"),
    h("h1", null, session.cluster ? `Sign in to ${session.cluster}` : "Sign in"),
    notice && h("p", { class: "notice", role: "status" }, notice),
    session.sign_in.key && form,
    session.sign_in.key && session.sign_in.oidc && h("p", { class: "or" }, "or"),
    session.sign_in.oidc && oidc,
    !session.sign_in.key && !session.sign_in.oidc && h("p", { class: "problem" }, "Signing in is switched off here."),
    themePicker(),
  );
}
