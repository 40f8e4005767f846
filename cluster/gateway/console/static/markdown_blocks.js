// The block structure of Markdown: where headings, paragraphs, lists, fences, quotes, tables and rules begin and end.
//
// Pure functions on lines. A block is a plain object with `kind`, `start` and `end` (line numbers, `end` excluded).
// Each line is read a bounded number of times for each level of nesting, and levels are bounded.

const FENCE = /^ {0,3}(`{3,}|~{3,})([^`]*)$/;
const HEADING = /^ {0,3}(#{1,6})(?:[ \t]+(.*))?$/;
const RULE = /^ {0,3}(?:(?:\*[ \t]*){3,}|(?:-[ \t]*){3,}|(?:_[ \t]*){3,})$/;
const QUOTE = /^ {0,3}> ?/;
const ITEM = /^( {0,3})([-*+]|\d{1,9}[.)])(?:( {1,4})(?=\S)|[ \t]|$)/;
const DELIMITERS = /^ {0,3}\|?[ \t]*:?-+:?[ \t]*(?:\|[ \t]*:?-+:?[ \t]*)*\|?[ \t]*$/;
export const MAX_DEPTH = 8;
const MAX_COLUMNS = 64;

/** Return the blocks of some lines. Blocks that hold blocks (quotes, list items) have their own `lines`. */
export function blocksOf(lines, depth = 0) {
  const blocks = [];
  let at = 0;
  while (at < lines.length) {
    if (isBlank(lines[at])) {
      at += 1;
      continue;
    }
    const block = blockAt(lines, at, depth);
    block.start = at;
    blocks.push(block);
    at = block.end;
  }
  return blocks;
}

function blockAt(lines, at, depth) {
  const line = lines[at];
  const fence = FENCE.exec(line);
  if (fence) return fenceAt(lines, at, fence);
  const heading = HEADING.exec(line);
  if (heading) return headingAt(at, heading);
  if (RULE.test(line)) return { kind: "rule", end: at + 1 };
  if (depth < MAX_DEPTH) {
    if (QUOTE.test(line)) return quoteAt(lines, at);
    if (ITEM.test(line)) return listAt(lines, at, depth);
  }
  if (isTable(lines, at)) return tableAt(lines, at);
  return paragraphAt(lines, at, depth);
}

function isBlank(line) {
  return line.trim() === "";
}

function fenceAt(lines, at, [, mark, info]) {
  const close = new RegExp(`^ {0,3}\\${mark[0]}{${mark.length},}[ \\t]*$`);
  let end = at + 1;
  while (end < lines.length && !close.test(lines[end])) end += 1;
  const isClosed = end < lines.length;
  return {
    kind: "fence",
    info: info.trim(),
    code: lines.slice(at + 1, end),
    isClosed,
    close,
    end: end + (isClosed ? 1 : 0),
  };
}

function headingAt(at, [, marks, text]) {
  return {
    kind: "heading",
    level: marks.length,
    text: (text ?? "").replace(/(^|[ \t])#{1,64}[ \t]*$/, "").trim(),
    end: at + 1,
  };
}

function quoteAt(lines, at) {
  let end = at;
  const inner = [];
  while (end < lines.length && QUOTE.test(lines[end])) {
    inner.push(lines[end].replace(QUOTE, ""));
    end += 1;
  }
  return { kind: "quote", lines: inner, end };
}

/** Read a list. An item holds the lines that are indented at least as far as the item's text, blank lines between them
 * included, and the lines that go on with its paragraph. */
function listAt(lines, at, depth) {
  const first = ITEM.exec(lines[at]);
  const isOrdered = /\d/.test(first[2]);
  const list = { kind: "list", isOrdered, first: isOrdered ? Number.parseInt(first[2], 10) : 1, items: [], end: at };
  let item = null;
  let indent = 0;
  for (let i = at; i < lines.length; i += 1) {
    const line = lines[i];
    if (isBlank(line)) {
      item.push("");
      continue;
    }
    const mark = ITEM.exec(line);
    if (item && indentOf(line) >= indent) {
      item.push(withoutIndent(line, indent));
    } else if (mark && !RULE.test(line) && /\d/.test(mark[2]) === isOrdered) {
      indent = Math.max(mark[0].length, mark[1].length + mark[2].length + 1);
      item = [line.slice(indent)];
      list.items.push(item);
    } else if (item && item.at(-1) !== "" && !mark && !startsBlock(lines, i, depth)) {
      item.push(line.trimStart());
    } else {
      break;
    }
    list.end = i + 1;
  }
  for (const each of list.items) {
    while (each.length > 1 && each.at(-1) === "") each.pop();
  }
  return list;
}

/** Return how many columns a line is indented. A tab counts as four. */
function indentOf(line) {
  const indent = /^[ \t]*/.exec(line)[0];
  return indent.includes("\t") ? indent.replaceAll("\t", "    ").length : indent.length;
}

function withoutIndent(line, columns) {
  const indent = /^[ \t]*/.exec(line)[0];
  let rest = columns;
  let at = 0;
  while (rest > 0 && at < indent.length) {
    rest -= indent[at] === "\t" ? 4 : 1;
    at += 1;
  }
  return " ".repeat(-Math.min(rest, 0)) + line.slice(at);
}

function isTable(lines, at) {
  return (
    lines[at].includes("|") &&
    at + 1 < lines.length &&
    lines[at + 1].includes("-") &&
    DELIMITERS.test(lines[at + 1]) &&
    cells(lines[at]).length === cells(lines[at + 1]).length
  );
}

function tableAt(lines, at) {
  const aligns = cells(lines[at + 1]).map((cell) =>
    cell.endsWith(":") ? (cell.startsWith(":") ? "center" : "right") : "",
  );
  const rows = [];
  let end = at + 2;
  while (end < lines.length && !isBlank(lines[end]) && lines[end].includes("|")) {
    const row = cells(lines[end]);
    rows.push(
      row.length > aligns.length ? [...row.slice(0, aligns.length - 1), row.slice(aligns.length - 1).join(" | ")] : row,
    );
    end += 1;
  }
  return { kind: "table", head: cells(lines[at]), aligns, rows, end };
}

/** Split a table's row at the vertical bars that are not escaped, into at most 64 cells. */
function cells(line) {
  const found = [];
  let cell = "";
  const text = line.trim().replace(/^\|/, "");
  for (let i = 0; i < text.length; i += 1) {
    if (text[i] === "\\" && text[i + 1] === "|") {
      cell += "|";
      i += 1;
    } else if (text[i] === "|" && found.length < MAX_COLUMNS - 1) {
      found.push(cell.trim());
      cell = "";
    } else {
      cell += text[i];
    }
  }
  if (cell.trim() || found.length === 0 || !text.endsWith("|")) found.push(cell.trim());
  return found;
}

function startsBlock(lines, at, depth) {
  const line = lines[at];
  if (FENCE.test(line) || HEADING.test(line) || RULE.test(line) || isTable(lines, at)) return true;
  if (depth >= MAX_DEPTH) return false;
  const item = ITEM.exec(line);
  return QUOTE.test(line) || (item !== null && item[0].length < line.length);
}

function paragraphAt(lines, at, depth) {
  let end = at + 1;
  while (end < lines.length && !isBlank(lines[end]) && !startsBlock(lines, end, depth)) end += 1;
  return { kind: "paragraph", lines: lines.slice(at, end), end };
}
