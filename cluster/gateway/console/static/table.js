/** A table whose rows are patched in place by id: unchanged rows are not touched, and the order changes seldom. */

import { h, missing, scroller, setAttribute, setHidden, setText } from "./dom.js";
import { compare, count } from "./format.js";

const REORDER_MS = 5000;

/**
 * @typedef {object} Column
 * @property {string} key
 * @property {string} label
 * @property {string} [title] what the column means, on hover
 * @property {number} width the least width in rem; what is left is shared out in proportion
 * @property {boolean} [isNumber] aligned right
 * @property {(row: any) => any} [sort] the value by which rows are sorted
 * @property {(row: any) => string | null} [text] what the cell shows; null is shown as an en dash
 * @property {string} [missing] why a value can be missing
 * @property {(cell: HTMLElement) => (row: any) => void} [build] makes the cell and returns what updates it
 */

/** Shows at most `limit` rows, in the order of a column that the reader picks. */
export class KeyedTable {
  /**
   * @typedef {{key: string, isDown: boolean}} Sort
   * @param {{caption: string, columns: Column[], sort: Sort | null, limit?: number, empty?: string,
   *   rowClass?: (row: any) => string, holds?: boolean}} options
   * `sort`: null for the given order. `holds`: whether the order stays while the pointer or the focus is in the table.
   */
  constructor(options) {
    this._options = { limit: 200, empty: "Nothing to show.", rowClass: () => "", holds: false, ...options };
    this._sort = options.sort && { ...options.sort };
    this._rows = new Map();
    this._order = [];
    this._orderedAt = -REORDER_MS;
    this._source = [];
    this._isHeld = false;
    this._build();
  }

  /** Show these rows. Each has an `id`; a row that is the same object as before is not touched. */
  set(rows) {
    this._source = rows;
    const byId = new Map(rows.map((row) => [row.id, row]));
    if (!this._isHeld && this._isOrderOld(byId)) this._reorder(rows);
    let added = 0;
    if (this._isHeld) for (const id of byId.keys()) added += this._rows.has(id) ? 0 : 1;
    for (const id of this._order) {
      const row = byId.get(id);
      if (row) this._show(id, row);
    }
    if (!this._isHeld) this._arrange();
    this._notes(rows.length, added);
  }

  /** Sort again at once, although the order was set a moment ago. */
  sortNow() {
    this._orderedAt = -REORDER_MS;
    this.set(this._source);
  }

  _isOrderOld(byId) {
    if (performance.now() - this._orderedAt > REORDER_MS) return true;
    return byId.size !== this._known?.size || [...byId.keys()].some((id) => !this._known.has(id));
  }

  _reorder(rows) {
    this._order = this._sorted(rows)
      .slice(0, this._options.limit)
      .map((row) => row.id);
    this._known = new Set(rows.map((row) => row.id));
    this._orderedAt = performance.now();
  }

  _sorted(rows) {
    if (!this._sort) return rows;
    const column = this._options.columns.find((each) => each.key === this._sort.key);
    const value = column.sort ?? column.text;
    const turn = this._sort.isDown ? -1 : 1;
    const keyed = rows.map((row) => [value(row), row]);
    keyed.sort(([a, first], [b, second]) => {
      const order = isNone(a) || isNone(b) ? Number(isNone(a)) - Number(isNone(b)) : turn * compare(a, b);
      return order || compare(first.id, second.id);
    });
    return keyed.map(([, row]) => row);
  }

  _show(id, row) {
    let shown = this._rows.get(id);
    if (!shown) {
      shown = this._newRow(id);
      this._rows.set(id, shown);
    }
    if (shown.row === row) return;
    shown.row = row;
    for (const update of shown.updates) update(row);
    setAttribute(shown.node, "class", this._options.rowClass(row) || null);
  }

  _newRow(id) {
    const node = h("tr", { role: "row", dataset: { id } });
    const updates = this._options.columns.map((column, index) => {
      const isHead = index === 0;
      const kind = column.isNumber ? "number" : null;
      const cell = h(isHead ? "th" : "td", {
        role: isHead ? "rowheader" : "cell",
        scope: isHead ? "row" : null,
        class: kind,
        dataset: { label: column.label, column: column.key },
      });
      node.append(cell);
      return column.build ? column.build(cell) : textCell(cell, column);
    });
    return { node, updates, row: null };
  }

  _arrange() {
    const wanted = new Set(this._order);
    for (const [id, shown] of this._rows) {
      if (wanted.has(id)) continue;
      shown.node.remove();
      this._rows.delete(id);
    }
    let next = this._body.firstChild;
    for (const id of this._order) {
      const node = this._rows.get(id)?.node;
      if (!node) continue;
      if (node === next) next = next.nextSibling;
      else this._body.insertBefore(node, next);
    }
  }

  _notes(total, added) {
    setHidden(this._empty, total > 0);
    setHidden(this._scroll, total === 0);
    setText(this._empty, this._options.empty);
    const notes = [];
    if (total > this._options.limit)
      notes.push(`The first ${count(this._options.limit)} of ${count(total)} rows are shown. Filter to see others.`);
    if (added)
      notes.push(`${count(added)} more since the pointer or the focus is in the table; they are shown when it leaves.`);
    setText(this._note, notes.join(" "));
    setHidden(this._note, !notes.length);
  }

  _sortBy(key) {
    this._sort = { key, isDown: this._sort?.key === key ? !this._sort.isDown : this._isNumber(key) };
    this._markSort();
    this._reorder(this._source);
    for (const row of this._source) if (this._order.includes(row.id)) this._show(row.id, row);
    this._arrange();
  }

  _isNumber(key) {
    return Boolean(this._options.columns.find((column) => column.key === key)?.isNumber);
  }

  _markSort() {
    if (!this._sort) return;
    for (const [key, head] of this._heads) {
      const word = this._sort.isDown ? "descending" : "ascending";
      setAttribute(head, "aria-sort", key === this._sort.key ? word : null);
    }
    this._picker.value = this._sort.key;
  }

  _build() {
    const { columns, caption } = this._options;
    this._heads = new Map();
    const widths = columns.map((column) => {
      const col = h("col");
      col.style.setProperty("width", `${column.width}rem`);
      return col;
    });
    const heads = columns.map((column) => {
      const isSortable = this._sort && Boolean(column.sort ?? column.text);
      const label = isSortable
        ? h("button", { type: "button", class: "sort", on: { click: () => this._sortBy(column.key) } }, column.label)
        : column.label || h("span", { class: "visually-hidden" }, "Actions");
      const head = h(
        "th",
        { role: "columnheader", scope: "col", title: column.title, class: column.isNumber ? "number" : null },
        label,
      );
      this._heads.set(column.key, head);
      return head;
    });
    const sortable = columns.filter((column) => column.sort ?? column.text);
    this._picker = h(
      "select",
      { on: { change: (event) => this._sortBy(event.target.value) } },
      sortable.map((column) => h("option", { value: column.key }, column.label)),
    );
    this._body = h("tbody", { role: "rowgroup" });
    const table = h(
      "table",
      { role: "table", class: "rows" },
      h("caption", { class: "visually-hidden" }, caption),
      h("colgroup", null, widths),
      h("thead", { role: "rowgroup" }, h("tr", { role: "row" }, heads)),
      this._body,
    );
    table.style.setProperty("--table-width", `${columns.reduce((sum, column) => sum + column.width, 0)}rem`);
    this._scroll = scroller(`${caption}, table`, table);
    this._empty = h("p", { class: "empty", hidden: true });
    this._note = h("p", { class: "note", hidden: true });
    this.node = h(
      "div",
      { class: "table" },
      this._sort && h("label", { class: "sort-picker" }, "Sort by ", this._picker),
      this._scroll,
      this._empty,
      this._note,
    );
    this._markSort();
    if (this._options.holds) this._holdOn(this._body);
  }

  _holdOn(body) {
    const hold = () => (this._isHeld = true);
    const release = () => {
      if (body.matches(":hover") || body.contains(document.activeElement)) return;
      this._isHeld = false;
      this._orderedAt = -REORDER_MS;
      this.set(this._source);
    };
    body.addEventListener("pointerenter", hold);
    body.addEventListener("focusin", hold);
    body.addEventListener("pointerleave", () => setTimeout(release));
    body.addEventListener("focusout", () => setTimeout(release));
  }
}

const isNone = (value) => value === null || value === undefined || value === "";

function textCell(cell, column) {
  let shown;
  return (row) => {
    const text = column.text(row);
    if (text === shown) return;
    shown = text;
    if (text === null || text === undefined || text === "") cell.replaceChildren(missing(column.missing));
    else cell.textContent = text;
  };
}
