/**
 * Builds the page's elements. No text is ever parsed as HTML: text becomes text nodes, so that a name with markup in
 * it is shown as it is.
 */

const SVG = "http://www.w3.org/2000/svg";

/**
 * Create an element. Keys of `props` are attributes, but `class`, `dataset`, `on` (listeners by event) and `value`,
 * `checked`, `disabled`, `hidden`, `selected`, `open` (properties) are set as such. null and false leave a key out.
 * @param {string} tag
 * @param {Record<string, any> | null} [props]
 * @param {...(Node | string | number | null | false | undefined | any[])} children
 * @returns {any}
 */
export function h(tag, props, ...children) {
  return fill(document.createElement(tag), props, children);
}

/** Create an SVG element, as h() does for HTML. */
export function svg(tag, props, ...children) {
  return fill(document.createElementNS(SVG, tag), props, children);
}

const PROPERTIES = new Set(["value", "checked", "disabled", "hidden", "selected", "open", "htmlFor", "tabIndex"]);

function fill(node, props, children) {
  for (const [key, value] of Object.entries(props ?? {})) {
    if (value === null || value === undefined || value === false) continue;
    if (key === "class") node.setAttribute("class", value);
    else if (key === "dataset") Object.assign(node.dataset, value);
    else if (key === "on") for (const [event, act] of Object.entries(value)) node.addEventListener(event, act);
    else if (PROPERTIES.has(key)) node[key] = value;
    else node.setAttribute(key, value === true ? "" : String(value));
  }
  append(node, children);
  return node;
}

function append(node, children) {
  for (const child of children) {
    if (child === null || child === undefined || child === false) continue;
    if (Array.isArray(child)) append(node, child);
    else node.append(child instanceof Node ? child : document.createTextNode(String(child)));
  }
}

/** Return a part of the page that scrolls sideways by itself. The keyboard reaches it only while it has to scroll. */
export function scroller(label, content) {
  const node = h("div", { class: "scroll", role: "region", "aria-label": label }, content);
  const observer = new ResizeObserver(() =>
    setAttribute(node, "tabindex", node.scrollWidth > node.clientWidth ? "0" : null),
  );
  observer.observe(node);
  observer.observe(content);
  return node;
}

/** Set an element's text, and touch the document only if the text is another one. */
export function setText(node, text) {
  if (node.shownText === text) return;
  node.shownText = text;
  node.textContent = text;
}

/** Set or remove an attribute, and touch the document only if the value is another one. */
export function setAttribute(node, name, value) {
  if (value === null || value === undefined || value === false) {
    if (node.hasAttribute(name)) node.removeAttribute(name);
  } else if (node.getAttribute(name) !== String(value)) node.setAttribute(name, String(value));
}

/** Show or hide an element. */
export function setHidden(node, isHidden) {
  if (node.hidden !== isHidden) node.hidden = isHidden;
}

/** Replace the children of an element. */
export function replace(node, ...children) {
  node.replaceChildren();
  append(node, children);
}

/** Return a button. `kind`: "", "primary", "danger" or "quiet". */
export function button(label, act, { kind = "", title = null, name = null } = {}) {
  return h("button", { type: "button", class: `button ${kind}`, title, "aria-label": name, on: { click: act } }, label);
}

const SENTENCE_CASE = (word) => (word ? word[0].toUpperCase() + word.slice(1).toLowerCase().replaceAll("_", " ") : "");

const TONES = {
  READY: "good",
  SERVING: "good",
  running: "good",
  ok: "good",
  active: "good",
  PLACING: "busy",
  LOADING: "busy",
  DECLARED: "busy",
  prefill: "busy",
  queued: "wait",
  resuming: "wait",
  CORDONED: "wait",
  DRAINING: "wait",
  DRAINED: "wait",
  quarantined: "bad",
  FAILED: "bad",
  LOST: "bad",
  failed: "bad",
  revoked: "off",
  expired: "off",
  cancelled: "off",
  IDLE: "off",
  GONE: "off",
  ended: "off",
};

/** Return the colour class of a state: good, busy, wait, bad or off. Outcomes other than ok and cancelled are bad. */
export function toneOf(state) {
  return TONES[state] ?? "bad";
}

/** Return an element that shows a state in words and colour, and a function that changes it. */
export function stateChip() {
  const node = h("span", { class: "chip" });
  return {
    node,
    /** @param {string} state @param {string} [words] @param {string} [tone] */
    set(state, words = SENTENCE_CASE(state), tone = toneOf(state)) {
      setText(node, words);
      setAttribute(node, "data-tone", tone);
      setAttribute(node, "data-state", state);
    },
  };
}

/** Return a bar of up to two parts beside a text. The text says all; the bar is hidden from screen readers. */
export function meter() {
  const first = h("span", { class: "meter-fill" });
  const second = h("span", { class: "meter-fill second" });
  const text = h("span", { class: "meter-text" });
  const node = h(
    "span",
    { class: "meter" },
    text,
    h("span", { class: "meter-track", "aria-hidden": "true" }, second, first),
  );
  let shown = "";
  return {
    node,
    /** @param {string} words @param {number | null} part @param {number} [more] @param {string} [tone] */
    set(words, part, more = 0, tone = "") {
      setText(text, words);
      const one = Math.min(Math.max(part ?? 0, 0), 1);
      const two = Math.min(Math.max(one + more, 0), 1);
      const next = `${one.toFixed(3)} ${two.toFixed(3)}`;
      if (next !== shown) {
        shown = next;
        first.style.setProperty("transform", `scaleX(${one.toFixed(3)})`);
        second.style.setProperty("transform", `scaleX(${two.toFixed(3)})`);
      }
      setAttribute(node, "data-tone", tone || null);
    },
  };
}

/** Return a line with the command that shows the same in a terminal. Names are quoted where a shell needs that. */
export function terminalHint(...words) {
  const quoted = words.map((word) => (/^[\w.:/=-]+$/.test(word) ? word : `'${word.replaceAll("'", `'\\''`)}'`));
  return h("p", { class: "hint" }, "In a terminal: ", h("code", null, quoted.join(" ")));
}

let politeRegion = null;
let waitingWords = [];

/** Return the region whose changes screen readers read out. There is one for the page. */
export function announcer() {
  politeRegion ??= h("div", { class: "visually-hidden", role: "status", "aria-live": "polite" });
  return politeRegion;
}

/** Have a change of state read out. Several changes within a second are read as one. */
export function announce(words) {
  waitingWords.push(words);
  if (waitingWords.length > 1) return;
  setTimeout(() => {
    const all = waitingWords.slice(0, 4).join(". ");
    const more = waitingWords.length - 4;
    announcer().textContent = more > 0 ? `${all}. And ${more} more changes` : all;
    waitingWords = [];
  }, 1000);
}

/** Return an element for "no value", with the reason on hover. */
export function missing(reason = "not known") {
  return h("span", { class: "missing", title: reason }, "–");
}
