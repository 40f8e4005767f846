/** The fleet page: charts of the last hour, models with their versions, and workers with their load. */

import { isScoped } from "./api.js";
import { announce, h, replace, setHidden, setText } from "./dom.js";
import { compact, count, plural, timeOfDay } from "./format.js";
import { modelColumns, modelRows } from "./models_table.js";
import { gatewayColumns } from "./gateways_table.js";
import { overviewCharts } from "./overview.js";
import { KeyedTable } from "./table.js";
import { workerColumns } from "./workers_table.js";

const WORKER_ROWS = 200;

/** @param {HTMLElement} container @param {any} context */
export function mount(container, context) {
  const page = new FleetPage(container, context);
  return { unmount: () => page.close() };
}

class FleetPage {
  constructor(container, context) {
    this._context = context;
    this._feed = context.feed;
    this._isScoped = isScoped(context.session);
    this._states = new Map();
    this._filter = "";
    this._charts = overviewCharts(context);
    this._summary = h("p", { class: "summary" });
    this._overload = h("p", { class: "notice", hidden: true });
    this._failures = h("div", { class: "problem", hidden: true });
    this._models = new KeyedTable({
      caption: "Models and their versions",
      columns: modelColumns(context),
      sort: null,
      rowClass: (row) => (row.version ? "sub" : ""),
      empty: "No model is in the catalog. Add one with headrace apply.",
    });
    container.append(
      h("div", { class: "page-head" }, h("h1", { tabindex: "-1" }, this._isScoped ? "Models" : "Fleet"), this._summary),
      this._failures,
      this._overload,
      this._charts.node,
      h(
        "section",
        { class: "panel", "aria-labelledby": "models-title" },
        h("h2", { id: "models-title" }, "Models"),
        this._models.node,
      ),
    );
    if (!this._isScoped) this._addWorkers(container);
    this._unsubscribe = this._feed.subscribe((changes) => this._update(changes));
  }

  close() {
    this._charts.close();
    this._unsubscribe();
  }

  _addWorkers(container) {
    this._workers = new KeyedTable({
      caption: "Workers",
      columns: workerColumns(this._context),
      sort: { key: "worker", isDown: false },
      limit: WORKER_ROWS,
      rowClass: (row) => (row.state === "LOST" ? "lost" : ""),
      empty: "No worker is linked. Models start when the controller places them.",
    });
    const filter = h("input", {
      type: "search",
      placeholder: "Id, model, node, state",
      autocomplete: "off",
      on: {
        input: () => {
          this._filter = filter.value.trim().toLowerCase();
          this._showWorkers();
        },
      },
    });
    container.append(
      h(
        "section",
        { class: "panel", "aria-labelledby": "workers-title" },
        h(
          "div",
          { class: "panel-head" },
          h("h2", { id: "workers-title" }, "Workers"),
          h("label", { class: "filter" }, "Filter ", filter),
        ),
        this._workers.node,
      ),
    );
    this._gateways = new KeyedTable({
      caption: "Gateways",
      columns: gatewayColumns(),
      sort: { key: "gateway", isDown: false },
      empty: "No gateway has reported.",
    });
    container.append(
      h(
        "section",
        { class: "panel", "aria-labelledby": "gateways-title" },
        h("h2", { id: "gateways-title" }, "Gateways"),
        this._gateways.node,
      ),
    );
  }

  _update({ isFull, changed }) {
    if (isFull || changed.models) this._models.set(modelRows(this._feed.rows("models")));
    if (this._workers && (isFull || changed.workers)) this._showWorkers();
    if (this._gateways && (isFull || changed.gateways)) this._gateways.set(this._feed.rows("gateways"));
    this._announce(isFull ? null : changed);
    this._summarise();
  }

  _showWorkers() {
    const rows = this._feed.rows("workers");
    const words = this._filter;
    const matches = (row) =>
      [row.id, row.model, row.version, row.node, row.host, row.pod, row.state, row.gpu]
        .join(" ")
        .toLowerCase()
        .includes(words);
    this._workers.set(words ? rows.filter(matches) : rows);
  }

  _showFailures(models) {
    const words = this._isScoped ? failures(models) : this._feed.rows("problems").map(sentence);
    setHidden(this._failures, !words.length);
    if (words.join("\n") === this._shownFailures) return;
    this._shownFailures = words.join("\n");
    replace(
      this._failures,
      words.slice(0, 5).map((each) => h("p", null, each)),
      words.length > 5 && h("p", null, `And ${count(words.length - 5)} more.`),
    );
  }

  _announce(changed) {
    for (const name of ["models", "workers"]) {
      const ids = changed ? (changed[name] ?? []) : this._feed.lists[name].keys();
      for (const id of ids) {
        const row = this._feed.lists[name].get(id);
        const key = `${name}/${id}`;
        const before = this._states.get(key);
        if (!row) this._states.delete(key);
        else if (before !== row.state) {
          this._states.set(key, row.state);
          if (changed && before)
            announce(`${name === "models" ? "Model" : "Worker"} ${id}: ${row.state.toLowerCase()}`);
        }
      }
    }
  }

  _summarise() {
    const models = this._feed.rows("models");
    const workers = this._feed.rows("workers");
    const sum = (rows, key) => rows.reduce((total, row) => total + (row[key] ?? 0), 0);
    const parts = [plural(models.length, "model")];
    if (!this._isScoped) {
      const ready = workers.filter((row) => row.state === "READY").length;
      const lost = workers.filter((row) => row.state === "LOST").length;
      parts.push(
        `${count(ready)} of ${plural(workers.length - lost, "worker")} ready${lost ? `, ${count(lost)} lost` : ""}`,
      );
      parts.push(plural(this._feed.lists.gateways.size, "gateway"));
    }
    const loads = this._isScoped ? this._feed.rows("tenants") : models;
    parts.push(
      `${count(sum(loads, "running"))} running`,
      `${count(sum(loads, "waiting"))} waiting`,
      `${compact(sum(loads, "tokens_per_s"))} tokens/s`,
    );
    setText(this._summary, parts.join(" · "));
    this._showFailures(models);
    const full = overloaded(models, workers);
    setHidden(this._overload, !full.length);
    setText(
      this._overload,
      full.length ? `Overloaded: ${full.join(", ")}. All sequences of the workers are in use, and calls wait.` : "",
    );
  }
}

/** Return what is wrong, why, since when, and what helps. */
function sentence({ summary, cause, since_s: since, remedy, hurts }) {
  const what = summary.charAt(0).toUpperCase() + summary.slice(1);
  const whom = hurts === "callers" ? "Callers notice. " : "";
  return `${what}${cause ? ` (${cause})` : ""}, since ${timeOfDay(since)}. ${whom}${remedy.charAt(0).toUpperCase()}${remedy.slice(1)}.`;
}

/** Return a sentence for each model or version that has failed. */
function failures(models) {
  return models.flatMap((model) => {
    const of = (name, { reason }) => `${name} has failed${reason ? `: ${reason}` : "."}`;
    if (model.state === "FAILED") return [of(model.id, model)];
    return (model.versions ?? [])
      .filter((each) => each.state === "FAILED")
      .map((each) => of(`${model.id}, version ${each.version},`, each));
  });
}

/** Return a phrase for each model whose ready workers are full while calls wait. */
function overloaded(models, workers) {
  return models.flatMap((model) => {
    const ready = workers.filter((worker) => worker.model === model.id && worker.state === "READY");
    const places = ready.reduce((total, worker) => total + worker.max_num_seqs, 0);
    const used = ready.reduce((total, worker) => total + worker.running, 0);
    const isFull = places > 0 && used >= 0.98 * places && model.waiting >= Math.max(4, 0.1 * places);
    return isFull ? [`${model.id} (${count(model.waiting)} wait)`] : [];
  });
}
