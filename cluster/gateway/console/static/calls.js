/** The calls page: running and recent calls with filters, and one call by its id. */

import { isScoped } from "./api.js";
import { callColumns } from "./calls_table.js";
import { mountCall } from "./call.js";
import { h, replace, setText } from "./dom.js";
import { compare, count, plural } from "./format.js";
import { linkTo } from "./shell.js";
import { KeyedTable } from "./table.js";

const STATES = [
  ["", "All"],
  ["open", "Not ended"],
  ["queued", "Waiting"],
  ["prefill", "Prefill"],
  ["running", "Running"],
  ["resuming", "Resuming"],
  ["resumed", "Resumed"],
  ["ended", "Ended"],
  ["failed", "Failed"],
];
const ROWS = 100;
const FILTERS = ["state", "tenant", "model", "worker"];

/** @param {HTMLElement} container @param {any} context @param {any} route */
export function mount(container, context, route) {
  return route.id ? mountCall(container, context, route.id) : new CallsPage(container, context, route);
}

class CallsPage {
  constructor(container, context, route) {
    this._feed = context.feed;
    this._names = FILTERS.filter((name) => !isScoped(context.session) || (name !== "tenant" && name !== "worker"));
    this._table = new KeyedTable({
      caption: "Calls",
      columns: callColumns(context.session),
      sort: { key: "arrived", isDown: true },
      holds: true,
      limit: ROWS,
      rowClass: (row) => (row.state === "ended" ? "faded" : ""),
      empty: "No call matches.",
    });
    this._summary = h("p", { class: "summary" });
    this._build(container);
    this.route(route);
    this._unsubscribe = this._feed.subscribe(({ isFull, changed }) => (isFull || changed.calls) && this._update());
  }

  unmount() {
    this._unsubscribe();
  }

  /** Take the filters from the address. */
  route({ query }) {
    this._wanted = Object.fromEntries(this._names.map((name) => [name, query.get(name) ?? ""]));
    this._update();
  }

  _build(container) {
    this._selects = new Map(
      this._names.map((name) => [
        name,
        h("select", { name, on: { change: (event) => this._filter(name, event.target.value) } }),
      ]),
    );
    replace(
      this._selects.get("state"),
      STATES.map(([value, label]) => h("option", { value }, label)),
    );
    const find = h("input", {
      type: "search",
      name: "id",
      autocomplete: "off",
      placeholder: "Request id or answer id",
      "aria-label": "Find a call by id",
    });
    const open = (event) => {
      event.preventDefault();
      if (find.value.trim()) location.hash = linkTo("calls", find.value.trim());
    };
    container.append(
      h("div", { class: "page-head" }, h("h1", { tabindex: "-1" }, "Calls"), this._summary),
      h(
        "section",
        { class: "panel", "aria-label": "Running and recent calls" },
        h(
          "div",
          { class: "panel-head" },
          h(
            "div",
            { class: "filters" },
            this._names.map((name) =>
              h("label", null, name[0].toUpperCase() + name.slice(1), " ", this._selects.get(name)),
            ),
          ),
          h(
            "form",
            { class: "filter", role: "search", on: { submit: open } },
            find,
            h("button", { type: "submit", class: "button" }, "Open"),
          ),
        ),
        this._table.node,
      ),
    );
  }

  _filter(name, value) {
    this._wanted[name] = value;
    history.replaceState(null, "", linkTo("calls", "", this._wanted));
    this._update();
  }

  _update() {
    const rows = this._feed.rows("calls");
    const now = this._feed.facts.at ?? null;
    const matching = rows.filter((row) => matches(row, this._wanted));
    this._table.set(
      matching.map((row) =>
        row.state === "ended" ? row : { ...row, duration_s: row.duration_s ?? now - row.arrived_s, now },
      ),
    );
    this._options(rows);
    const open = rows.filter((row) => row.state !== "ended");
    const waiting = open.filter((row) => row.state === "queued").length;
    setText(
      this._summary,
      [
        `${count(open.length - waiting)} running`,
        `${count(waiting)} waiting`,
        `${plural(rows.length - open.length, "recent call")} kept`,
      ].join(" · "),
    );
  }

  /** Offer the values that occur. A list that is open is left alone, so that nothing moves under the pointer. */
  _options(rows) {
    for (const name of this._names) {
      const select = this._selects.get(name);
      const wanted = this._wanted[name];
      if (name !== "state" && document.activeElement !== select) {
        const values = new Set(rows.map((row) => row[name]).filter(Boolean));
        if (wanted) values.add(wanted);
        const key = [...values].sort(compare);
        if (select.shownKey !== key.join("\n")) {
          select.shownKey = key.join("\n");
          replace(
            select,
            h("option", { value: "" }, "All"),
            key.map((value) => h("option", { value }, value)),
          );
        }
      }
      if (select.value !== wanted) select.value = wanted;
    }
  }
}

function matches(row, wanted) {
  if (wanted.tenant && row.tenant !== wanted.tenant) return false;
  if (wanted.model && row.model !== wanted.model) return false;
  if (wanted.worker && row.worker !== wanted.worker) return false;
  if (wanted.state === "open") return row.state !== "ended";
  if (wanted.state === "resumed") return row.resumes > 0;
  if (wanted.state === "failed") return row.state === "ended" && row.outcome !== "ok" && row.outcome !== "cancelled";
  return !wanted.state || row.state === wanted.state;
}
