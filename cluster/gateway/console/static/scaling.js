/** The scaling page: replicas wanted and had over time, and the decisions in words. */

import { LineChart } from "./charts.js";
import { showError } from "./dialog.js";
import { button, h, replace, scroller, setHidden, setText, stateChip, terminalHint } from "./dom.js";
import { compare, count, dateTime, duration, numberOf, plural, timeOfDay } from "./format.js";
import { History } from "./history.js";
import { chosenSeconds, rangePicker } from "./range_picker.js";
import { modelActions } from "./scaling_actions.js";

const DECISIONS = 20;
const MOST_CHARTS = 20;
const ACTIONS = { up: "Up", down: "Down", to_zero: "To zero", from_zero: "From zero", move: "Move", hold: "Hold" };
const BY = { demand: "by demand", manual: "by hand", frozen: "frozen" };

/** @param {HTMLElement} container @param {any} context */
export function mount(container, context) {
  const page = new ScalingPage(container, context);
  return { unmount: () => page.close() };
}

class ScalingPage {
  constructor(container, context) {
    this._context = context;
    this._panels = new Map();
    this._summary = h("p", { class: "summary" });
    this._empty = h("p", { class: "empty panel", hidden: true }, "No model is in the catalog.");
    this._list = h("div", { class: "page" });
    container.append(
      h("div", { class: "page-head" }, h("h1", { tabindex: "-1" }, "Scaling"), this._summary),
      rangePicker(context.session, (seconds) => this._setSeconds(seconds)) ?? "",
      this._empty,
      this._list,
    );
    this._unsubscribe = context.feed.subscribe(({ isFull, changed }) => (isFull || changed.scaling) && this._update());
  }

  _setSeconds(seconds) {
    for (const panel of this._panels.values()) panel.setSeconds(seconds);
  }

  close() {
    this._unsubscribe();
    for (const panel of this._panels.values()) panel.close();
  }

  _update() {
    const rows = this._context.feed.rows("scaling").sort((a, b) => compare(a.id, b.id));
    setHidden(this._empty, rows.length > 0);
    const sum = (key) => rows.reduce((total, row) => total + (row[key] ?? 0), 0);
    const frozen = rows.filter((row) => row.frozen).length;
    setText(
      this._summary,
      [
        plural(rows.length, "model"),
        `${count(sum("had"))} of ${plural(sum("wanted"), "replica")}`,
        `${count(frozen)} frozen`,
      ].join(" · "),
    );
    const ids = new Set(rows.map((row) => row.id));
    for (const [id, panel] of this._panels) {
      if (ids.has(id)) continue;
      panel.close();
      panel.node.remove();
      this._panels.delete(id);
    }
    rows.forEach((row, index) => {
      let panel = this._panels.get(row.id);
      if (!panel) {
        panel = new ModelScaling(this._context, row.id, index < MOST_CHARTS);
        this._panels.set(row.id, panel);
        this._list.insertBefore(panel.node, this._list.children[index] ?? null);
      }
      panel.update(row);
    });
  }
}

/** The panel of one model. `hasChart`: the first panels have their chart at once, the others when they are opened. */
class ModelScaling {
  constructor(context, model, hasChart) {
    this._api = context.api;
    this._model = model;
    this._frozen = stateChip();
    this._frozen.set("FROZEN", "Frozen", "wait");
    this._numbers = h("p", { class: "summary" });
    this._why = h("p", { class: "why" });
    this._decisions = h("div");
    this._chart = new LineChart({
      title: "Replicas",
      format: (value) => count(value, Number.isInteger(value) ? 0 : 1),
      floor: 2,
      isWhole: true,
      height: 110,
      lines: [
        { key: "replicas_had", label: "Had", isStep: true },
        { key: "replicas_wanted", label: "Wanted", tone: 1, isStep: true },
      ],
    });
    this._history = new History(context.api, {
      series: ["replicas_had", "replicas_wanted"],
      model,
      seconds: chosenSeconds(context.session),
    });
    const more = h(
      "details",
      { on: { toggle: () => more.open && void this._explain() } },
      h("summary", null, "Decisions"),
      this._decisions,
    );
    this.node = h(
      "section",
      { class: "panel", "aria-label": model },
      h("div", { class: "panel-head" }, h("h2", null, model), this._frozen.node, this._numbers, this._buttons(context)),
      h("div", { class: "panel-body" }, this._why, this._chart.node, more),
    );
    this._details = more;
    if (hasChart) this._startChart();
  }

  close() {
    this._history.stop();
    this._chart.close();
  }

  /** Show another range from now on. */
  setSeconds(seconds) {
    this._history.setSeconds(seconds);
  }

  update(row) {
    if (this._row === row) return;
    const isNews = this._row && this._row.reason !== row.reason;
    this._row = row;
    setHidden(this._frozen.node, !row.frozen);
    setText(this._numbers, `${count(row.had) ?? "–"} of ${plural(row.wanted ?? 0, "replica")}`);
    setText(this._why, row.reason || "The controller has not reported a decision yet.");
    if (this._freeze) setText(this._freeze, row.frozen ? "Unfreeze" : "Freeze");
    if (isNews && this._details.open) void this._explain();
  }

  _buttons(context) {
    if (!context.session.may.fleet) return null;
    const act = modelActions(context);
    const done = (promise) => promise.then(() => this._details.open && this._explain());
    this._freeze = button("Freeze", () =>
      done(this._row?.frozen ? act.unfreeze(this._model) : act.freeze(this._model)),
    );
    return h(
      "span",
      { class: "buttons" },
      button("Scale", () => done(act.scale(this._model)), { name: `Scale ${this._model}` }),
      this._freeze,
    );
  }

  _startChart() {
    if (this._isCharted) return;
    this._isCharted = true;
    this._history.start((error) => {
      if (!error)
        this._chart.set({
          replicas_had: this._history.points("replicas_had"),
          replicas_wanted: this._history.points("replicas_wanted"),
        });
    });
  }

  async _explain() {
    this._startChart();
    const hint = terminalHint("headrace", "explain", "scaling", this._model);
    try {
      const answer = await this._api.verb("Fleet.ExplainScaling", { name: this._model, limit: DECISIONS });
      replace(this._decisions, modelFacts(answer?.model ?? {}), decisionTable(answer?.decisions ?? []), hint);
    } catch (error) {
      showError(this._decisions, error, () => void this._explain());
    }
  }
}

function modelFacts(model) {
  const range = `${count(numberOf(model.min_replicas))} to ${count(numberOf(model.max_replicas))}`;
  const facts = [
    ["Decided", BY[model.by] ?? model.by],
    ["Wanted", count(numberOf(model.desired))],
    ["Run", count(numberOf(model.running))],
    ["Start", count(numberOf(model.starting))],
    ["Allowed", range],
    ["Cold start", numberOf(model.cold_start_s) ? duration(numberOf(model.cold_start_s)) : "not known yet"],
    ["To zero after", numberOf(model.idle_s) ? `${duration(numberOf(model.idle_s))} idle` : "never"],
  ];
  return h(
    "dl",
    { class: "facts spaced" },
    facts.map(([name, value]) => h("div", null, h("dt", null, name), h("dd", null, value ?? "–"))),
  );
}

function decisionTable(decisions) {
  if (!decisions.length) return h("p", { class: "empty" }, "No decision is remembered.");
  const rows = [...decisions].reverse().map((decision) => {
    const at = numberOf(decision.at_s);
    const numbers = Object.entries(decision.numbers ?? {}).map(
      ([name, value]) => `${name.replaceAll("_", " ")} ${count(value, Number.isInteger(value) ? 0 : 2)}`,
    );
    const before = numberOf(decision.replicas_before);
    const after = numberOf(decision.replicas);
    return h(
      "tr",
      null,
      h("th", { scope: "row", title: dateTime(at) }, timeOfDay(at)),
      h("td", null, ACTIONS[decision.action] ?? decision.action ?? ""),
      h("td", { class: "number" }, before === after ? count(after) : `${count(before)} → ${count(after)}`),
      h(
        "td",
        { class: "wrap" },
        decision.why,
        numbers.length ? h("span", { class: "detail" }, numbers.join(" · ")) : null,
      ),
      h(
        "td",
        { class: "number", title: "Passes of the controller that decided the same" },
        count(numberOf(decision.passes)),
      ),
    );
  });
  const heads = [["Time"], ["Action"], ["Replicas", "number"], ["Why"], ["Passes", "number"]];
  return scroller(
    "Decisions",
    h(
      "table",
      { class: "plain" },
      h(
        "thead",
        null,
        h(
          "tr",
          null,
          heads.map(([head, kind]) => h("th", { scope: "col", class: kind }, head)),
        ),
      ),
      h("tbody", null, rows),
    ),
  );
}
