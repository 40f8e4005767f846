// Inline Markdown as DOM nodes: code spans, emphasis, links, addresses.
//
// The text of a model is not trusted. Nodes are made with createElement and textContent only, so that HTML in the text
// stays text. A link needs an address with http, https or mailto, and the address is shown after the link's text. An
// image becomes a link: the page loads nothing from outside.
//
// The time is linear in the length of the text: each search either consumes what it reads or is bounded.

const SPECIAL = /[\\`*_~[\]!<]|https?:\/\//g;
const BARE_URL = /https?:\/\/[^\s<>"'`*[\]{}|\\^]*/y;
const AUTOLINK = /<((?:https?:\/\/|mailto:)[^\s<>]{1,2048})>/y;
const PATH = String.raw`[^\s()<>[\]]*(?:\([^\s()<>[\]]*\)[^\s()<>[\]]*){0,8}`;
const TITLE = String.raw`(?:[ \t]{1,8}(?:"[^"\n]{0,300}"|'[^'\n]{0,300}'))?[ \t]{0,8}`;
const DESTINATION = new RegExp(String.raw`\((?:<([^<>\n]{0,2048})>|(${PATH}))${TITLE}\)`, "y");
const ESCAPABLE = /[!-/:-@[-`{-~]/;
const PUNCTUATION = /[\p{P}\p{S}]/u;
const SCHEMES = /^(?:https?|mailto):/i;
const MAX_OPENERS = 24; // bounds how deeply elements nest
const MAX_RUN = 3;

/** Return the normalised address if a link may lead to it, else "". */
export function safeAddress(text) {
  if (!SCHEMES.test(text)) return "";
  let url;
  try {
    url = new URL(text);
  } catch {
    return "";
  }
  // An address with a user name looks like another host: https://bank.example@evil.example.
  return SCHEMES.test(url.protocol) && !url.username && !url.password ? url.href : "";
}

/** Append the inline nodes of a text to an element. */
export function appendInline(parent, text) {
  build(parent, tokenize(text));
}

/** Return a link whose address is visible. `address` comes from safeAddress. */
export function link(address, label) {
  const anchor = document.createElement("a");
  anchor.href = address;
  anchor.rel = "noopener noreferrer nofollow";
  anchor.target = "_blank";
  if (label) anchor.textContent = label;
  return anchor;
}

// ---- tokens: {text}, {code}, {url, label}, {open: [names]} beside text, {close: name}

function tokenize(text) {
  const reader = new Reader(text);
  while (reader.at < text.length) reader.readNext();
  return reader.tokens;
}

class Reader {
  constructor(text) {
    this.text = text;
    this.at = 0;
    this.tokens = [];
    this.openers = []; // delimiter runs and brackets that may still open an element
    this.backticks = null;
  }

  readNext() {
    SPECIAL.lastIndex = this.at;
    const found = SPECIAL.exec(this.text);
    const end = found ? found.index : this.text.length;
    if (end > this.at) this.addText(this.text.slice(this.at, end));
    this.at = end;
    if (!found) return;
    const mark = found[0];
    if (mark.length > 1) this.readBareUrl();
    else if (mark === "\\") this.readEscape();
    else if (mark === "`") this.readCode();
    else if (mark === "<") this.readAutolink();
    else if (mark === "[") this.readBracket("[");
    else if (mark === "]") this.readLinkEnd();
    else if (mark === "!") this.readBracket(this.text[this.at + 1] === "[" ? "![" : "!");
    else this.readRun(mark);
  }

  addText(text) {
    this.tokens.push({ text });
  }

  readEscape() {
    const next = this.text[this.at + 1];
    const isEscape = next !== undefined && ESCAPABLE.test(next);
    this.addText(isEscape ? next : "\\");
    this.at += isEscape ? 2 : 1;
  }

  readCode() {
    let length = 1;
    while (this.text[this.at + length] === "`") length += 1;
    const end = this.endOfCode(this.at + length, length);
    if (end < 0) {
      this.addText("`".repeat(length));
      this.at += length;
      return;
    }
    let code = this.text.slice(this.at + length, end);
    if (code.length > 2 && code.startsWith(" ") && code.endsWith(" ") && code.trim()) code = code.slice(1, -1);
    this.tokens.push({ code });
    this.at = end + length;
  }

  /** Return where the next run of exactly `length` backticks begins, or -1. All runs are indexed once. */
  endOfCode(from, length) {
    if (this.backticks === null) {
      this.backticks = new Map();
      for (const run of this.text.matchAll(/`+/g)) {
        const key = run[0].length;
        if (!this.backticks.has(key)) this.backticks.set(key, { starts: [], next: 0 });
        this.backticks.get(key).starts.push(run.index);
      }
    }
    const runs = this.backticks.get(length);
    if (!runs) return -1;
    while (runs.next < runs.starts.length && runs.starts[runs.next] < from) runs.next += 1;
    return runs.next < runs.starts.length ? runs.starts[runs.next] : -1;
  }

  readAutolink() {
    AUTOLINK.lastIndex = this.at;
    const found = AUTOLINK.exec(this.text);
    const url = found ? safeAddress(found[1]) : "";
    if (!url) {
      this.addText("<");
      this.at += 1;
      return;
    }
    this.tokens.push({ url, label: found[1] });
    this.at += found[0].length;
  }

  readBareUrl() {
    BARE_URL.lastIndex = this.at;
    let shown = BARE_URL.exec(this.text)[0];
    const whole = shown;
    shown = shown.replace(/[.,:;!?]{1,8}$/, "");
    if (shown.endsWith(")") && !shown.includes("(")) shown = shown.slice(0, shown.indexOf(")"));
    const before = this.text[this.at - 1] ?? " ";
    const url = /[\p{L}\p{N}]/u.test(before) ? "" : safeAddress(shown);
    if (!url) shown = whole;
    this.tokens.push(url ? { url, label: shown } : { text: shown });
    this.at += shown.length;
  }

  readBracket(mark) {
    this.addText(mark);
    if (mark !== "!") this.pushOpener({ mark, length: 1, token: this.tokens.length - 1 });
    this.at += mark.length;
  }

  readLinkEnd() {
    let index = this.openers.length - 1;
    while (index >= 0 && this.openers[index].mark !== "[" && this.openers[index].mark !== "![") index -= 1;
    const opener = this.openers[index];
    DESTINATION.lastIndex = this.at + 1;
    const found = opener ? DESTINATION.exec(this.text) : null;
    const url = found ? safeAddress(found[1] ?? found[2]) : "";
    if (!url) {
      if (opener) this.openers.splice(index, 1);
      this.addText("]");
      this.at += 1;
      return;
    }
    const isImage = opener.mark === "![";
    this.openers = this.openers.slice(0, index).filter((other) => other.mark !== "[" && other.mark !== "![");
    this.tokens[opener.token] = { open: [], anchor: url, isImage };
    this.tokens.push({ close: "a", url });
    this.at += 1 + found[0].length;
  }

  pushOpener(opener) {
    this.openers.push(opener);
    if (this.openers.length > MAX_OPENERS) this.openers.shift();
  }

  readRun(mark) {
    let length = 1;
    while (this.text[this.at + length] === mark) length += 1;
    const before = lastCharacter(this.text, this.at);
    const after = String.fromCodePoint(this.text.codePointAt(this.at + length) ?? 32);
    this.at += length;
    if (length > MAX_RUN || (mark === "~" && length !== 2)) {
      this.addText(mark.repeat(length));
      return;
    }
    const isLeft = !isSpace(after) && (!isPunctuation(after) || isSpace(before) || isPunctuation(before));
    const isRight = !isSpace(before) && (!isPunctuation(before) || isSpace(after) || isPunctuation(after));
    const isWord = mark === "_"; // no emphasis within words such as snake_case
    const canOpen = isLeft && (!isWord || !isRight || isPunctuation(before));
    const canClose = isRight && (!isWord || !isLeft || isPunctuation(after));
    const rest = canClose ? this.closeRun(mark, length) : length;
    if (rest === 0) return;
    this.addText(mark.repeat(rest));
    if (canOpen) this.pushOpener({ mark, length: rest, token: this.tokens.length - 1 });
  }

  /** Close the elements that a delimiter run ends. Returns how many characters of the run are left. */
  closeRun(mark, length) {
    while (length > 0) {
      let index = this.openers.length - 1;
      while (index >= 0 && this.openers[index].mark !== mark) index -= 1;
      if (index < 0) return length;
      const opener = this.openers[index];
      const used = mark === "~" ? 2 : Math.min(opener.length, length, 2);
      this.openers.length = index + 1;
      const token = this.tokens[opener.token];
      token.text = token.text.slice(used);
      const name = mark === "~" ? "del" : used === 2 ? "strong" : "em";
      (token.open ??= []).unshift(name);
      this.tokens.push({ close: name });
      opener.length -= used;
      length -= used;
      if (opener.length === 0) this.openers.pop();
    }
    return 0;
  }
}

function lastCharacter(text, end) {
  if (end === 0) return " ";
  const unit = text.charCodeAt(end - 1);
  const isLow = unit >= 0xdc00 && unit <= 0xdfff && end > 1;
  return String.fromCodePoint(text.codePointAt(end - (isLow ? 2 : 1)));
}

function isSpace(character) {
  return /\s/.test(character);
}

function isPunctuation(character) {
  return PUNCTUATION.test(character);
}

// ---- nodes

function build(parent, tokens) {
  const stack = [parent];
  let pending = "";
  const flush = () => {
    if (pending) stack.at(-1).append(document.createTextNode(pending));
    pending = "";
  };
  for (const token of tokens) {
    if (token.text) pending += token.text;
    if (token.text !== undefined && !token.open) continue;
    flush();
    if (token.close) {
      const element = stack.pop();
      if (token.url) appendTarget(stack.at(-1), token.url, element);
    } else if (token.anchor) {
      const anchor = link(token.anchor);
      if (token.isImage) anchor.className = "md-image";
      stack.at(-1).append(anchor);
      stack.push(anchor);
    } else if (token.open) {
      for (const name of token.open) {
        const element = document.createElement(name);
        stack.at(-1).append(element);
        stack.push(element);
      }
    } else if (token.url) {
      const anchor = link(token.url, token.label);
      stack.at(-1).append(anchor);
      appendTarget(stack.at(-1), token.url, anchor);
    } else {
      const code = document.createElement("code");
      code.textContent = token.code;
      stack.at(-1).append(code);
    }
  }
  flush();
}

/** Show the address of a link after the link, unless the link's text is the address. A link without visible text gets
 * the address as its text. */
function appendTarget(parent, url, anchor) {
  const shown = anchor.textContent.trim();
  if (!shown) anchor.textContent = url;
  const isShown = !shown || shown === url || `${shown}/` === url || `mailto:${shown}` === url;
  if (isShown && !anchor.classList.contains("md-image")) return;
  const target = document.createElement("span");
  target.className = "md-target";
  target.textContent = anchor.classList.contains("md-image") ? ` (image: ${url})` : ` (${url})`;
  parent.append(target);
}
