// Markdown as DOM nodes, whole or while its text arrives.
//
// See markdown_inline.js for what makes the result safe. While a text arrives, only its last block is rendered again;
// an unclosed code fence only gets further text. The total time is linear in the length of the text.

import { copyButton } from "./copy.js";
import { appendInline } from "./markdown_inline.js";
import { MAX_DEPTH, blocksOf } from "./markdown_blocks.js";

const TOP_LEVEL = 3; // the page has h1 and h2
const OFTEN_CHARACTERS = 8192; // a longer block is rendered again each time it has grown by an eighth

/** Return an element that holds a whole text. */
export function renderMarkdown(text) {
  const element = document.createElement("div");
  const view = new MarkdownView(element);
  view.append(text);
  view.finish();
  return element;
}

/** Shows a Markdown text that arrives in pieces. The container then holds what the whole text would give. */
export class MarkdownView {
  constructor(container) {
    container.classList.add("md");
    this._container = container;
    this._text = ""; // of the blocks that may still change
    this._pending = "";
    this._open = []; // the nodes of these blocks
    this._rendered = 0;
    this._fence = null;
    this._level = TOP_LEVEL - 1;
    this._carriage = "";
  }

  /** Add a piece of the text. */
  append(piece) {
    let text = this._carriage + piece;
    this._carriage = text.endsWith("\r") ? "\r" : ""; // perhaps a half of \r\n
    if (this._carriage) text = text.slice(0, -1);
    text = text.replace(/\r\n?/g, "\n");
    if (!text) return;
    if (this._fence && this._fence.append(text)) {
      this._pending += text;
      return;
    }
    this._fence = null;
    this._pending += text;
    const length = this._text.length + this._pending.length;
    if (length > OFTEN_CHARACTERS && length < this._rendered * 1.125) {
      this._showPlain(text);
    } else {
      this._render(false);
    }
  }

  /** Render what was put off. Call it when the text has ended. */
  finish() {
    this._pending += this._carriage;
    this._carriage = "";
    this._fence = null;
    this._render(true);
  }

  _showPlain(text) {
    const node = document.createTextNode(text);
    (this._open.at(-1) ?? this._container).append(node);
  }

  _render(isLast) {
    this._text += this._pending;
    this._pending = "";
    this._rendered = this._text.length;
    for (const node of this._open) node.remove();
    this._open = [];
    const lines = this._text.split("\n");
    const blocks = blocksOf(lines);
    const settled = isLast ? blocks.length : settledCount(blocks, lines.length - 1);
    const context = { level: this._level };
    blocks.forEach((block, index) => {
      if (index === settled) this._level = context.level;
      const node = nodeOf(block, 0, context);
      this._container.append(node);
      if (index >= settled) this._open.push(node);
    });
    if (settled === blocks.length) this._level = context.level;
    if (isLast) this._text = "";
    else if (settled > 0) this._text = restOf(this._text, blocks[settled]?.start ?? blocks.at(-1).end);
    const last = blocks.at(-1);
    if (!isLast && last?.kind === "fence" && !last.isClosed) this._fence = new OpenFence(this._open.at(-1), last);
  }
}

/** Return how many blocks no further text can change: those before a block of which two lines are complete (the second
 * could make a table of it), and those that end with a line of their own. */
function settledCount(blocks, completeLines) {
  for (let count = blocks.length; count > 0; count -= 1) {
    const block = blocks[count - 1];
    const endsItself = block.kind === "heading" || block.kind === "rule" || (block.kind === "fence" && block.isClosed);
    if (endsItself && block.end <= completeLines) return count;
    if (block.start + 2 <= completeLines) return count - 1;
  }
  return 0;
}

function restOf(text, line) {
  let at = 0;
  for (let i = 0; i < line; i += 1) at = text.indexOf("\n", at) + 1;
  return text.slice(at);
}

/** The text of a code fence whose end has not arrived. */
class OpenFence {
  constructor(node, block) {
    const code = node.querySelector("code");
    this._close = block.close;
    this._isOpening = block.end === block.start + 1; // the first line may still grow
    this._partial = block.code.at(-1) ?? "";
    this._complete = document.createTextNode(
      block.code
        .slice(0, -1)
        .map((line) => `${line}\n`)
        .join(""),
    );
    this._last = document.createTextNode(this._partial);
    code.replaceChildren(this._complete, this._last);
  }

  /** Show more text. Returns false, and shows nothing, if the text may end the fence. */
  append(text) {
    if (this._isOpening) return false;
    const lines = (this._partial + text).split("\n");
    if (lines.some((line) => /^ {0,3}[`~]/.test(line) && this._close.test(line))) return false;
    this._partial = lines.pop();
    if (lines.length) this._complete.appendData(lines.map((line) => `${line}\n`).join(""));
    this._last.data = this._partial;
    return true;
  }
}

// ---- nodes of blocks

function nodeOf(block, depth, context) {
  switch (block.kind) {
    case "heading":
      return headingNode(block, context);
    case "fence":
      return codeNode(block);
    case "rule":
      return document.createElement("hr");
    case "quote":
      return quoteNode(block, depth, context);
    case "list":
      return listNode(block, depth, context);
    case "table":
      return tableNode(block);
    default:
      return inlineNode("p", block.lines.map((line) => line.trim()).join("\n"));
  }
}

function inlineNode(name, text) {
  const element = document.createElement(name);
  appendInline(element, text);
  return element;
}

/** Headings never skip a level, whatever the text does: screen readers announce the levels. */
function headingNode(block, context) {
  if (!block.text) return inlineNode("p", "");
  context.level = Math.min(block.level + TOP_LEVEL - 1, context.level + 1, 6);
  const heading = inlineNode(`h${context.level}`, block.text);
  heading.className = `md-h${block.level}`;
  return heading;
}

function codeNode(block) {
  const box = document.createElement("div");
  box.className = "md-code";
  const head = document.createElement("div");
  head.className = "md-code-head";
  const language = document.createElement("span");
  language.textContent = block.info;
  const code = document.createElement("code");
  code.textContent = block.code.join("\n");
  head.append(
    language,
    copyButton(() => code.textContent),
  );
  const pre = document.createElement("pre");
  pre.tabIndex = 0; // a wide text scrolls, also by keyboard
  pre.append(code);
  box.append(head, pre);
  return box;
}

function quoteNode(block, depth, context) {
  const quote = document.createElement("blockquote");
  appendBlocks(quote, block.lines, depth + 1, context);
  return quote;
}

function listNode(block, depth, context) {
  const list = document.createElement(block.isOrdered ? "ol" : "ul");
  if (block.isOrdered && block.first !== 1) list.start = block.first;
  for (const lines of block.items) {
    const item = document.createElement("li");
    appendBlocks(item, lines, depth + 1, context);
    list.append(item);
  }
  return list;
}

function appendBlocks(parent, lines, depth, context) {
  for (const block of blocksOf(lines, Math.min(depth, MAX_DEPTH))) parent.append(nodeOf(block, depth, context));
}

function tableNode(block) {
  const box = document.createElement("div");
  box.className = "md-table";
  box.tabIndex = 0;
  box.setAttribute("role", "group");
  box.setAttribute("aria-label", "Table");
  const table = document.createElement("table");
  table.append(rowNode(block.head, block.aligns, "th"));
  for (const row of block.rows) table.append(rowNode(row, block.aligns, "td"));
  box.append(table);
  return box;
}

function rowNode(row, aligns, kind) {
  const element = document.createElement("tr");
  row.forEach((text, column) => {
    const cell = inlineNode(text ? kind : "td", text); // a header cell without text is none
    if (kind === "th" && text) cell.scope = "col";
    if (aligns[column]) cell.className = `md-${aligns[column]}`;
    element.append(cell);
  });
  return element;
}
