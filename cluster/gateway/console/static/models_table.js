/** Columns of the models' table. A model with several versions has a row for each below its own. */

import { isScoped } from "./api.js";
import { button, h, meter, setAttribute, setHidden, setText, stateChip } from "./dom.js";
import { compare, count, duration, percent, rate } from "./format.js";
import { modelActions } from "./scaling_actions.js";
import { linkTo } from "./shell.js";

const flattened = new WeakMap();

/** Return a row for each model and, where there are several versions or one is in quarantine, for each version. */
export function modelRows(models) {
  const sorted = [...models].sort((a, b) => compare(a.id, b.id));
  return sorted.flatMap((model) => {
    let rows = flattened.get(model);
    if (!rows) {
      const versions = model.versions ?? [];
      const isPlain = versions.length < 2 && !versions.some((each) => each.quarantined);
      const own = { ...model, model: model.id, version: null, only: versions.length === 1 ? versions[0].version : "" };
      rows = [
        own,
        ...(isPlain ? [] : versions.map((each) => ({ ...each, id: `${model.id}\n${each.version}`, model: model.id }))),
      ];
      flattened.set(model, rows);
    }
    return rows;
  });
}

/** Columns of what the viewer may see: viewers of one tenant get the state and not the load.
 * @returns {import("./table.js").Column[]} */
export function modelColumns(context) {
  const name = { key: "model", label: "Model", width: 12, build: nameCell };
  const state = { key: "state", label: "State", width: 12.6, build: stateCell };
  if (isScoped(context.session)) return [name, state];
  const number = (key, label, text, more = {}) => ({
    key,
    label,
    width: 4.7,
    isNumber: true,
    build: modelCell(text, more.missing),
    ...more,
  });
  return [
    name,
    state,
    {
      key: "replicas",
      label: "Replicas",
      width: 5.6,
      isNumber: true,
      title: "Replicas that serve, of those that are wanted",
      build: replicasCell,
    },
    number("running", "Running", (row) => count(row.running)),
    number("waiting", "Waiting", (row) => count(row.waiting)),
    number("tokens", "Tokens/s", (row) => rate(row.tokens_per_s)),
    {
      key: "ttft",
      label: "TTFT",
      width: 6,
      isNumber: true,
      title: "Time to first token, median and 99th percentile",
      build: ttftCell,
    },
    number("cache", "Cached", (row) => percent(row.cache_hit), {
      width: 5.6,
      title: "Part of the prompt tokens found in KV caches",
      missing: "no recent prompt",
    }),
    ...(context.session.may.fleet
      ? [{ key: "act", label: "", width: 9, build: (cell) => actionsCell(cell, context) }]
      : []),
  ];
}

/** A cell that is empty for versions, and shows an en dash for a missing value of a model. */
function modelCell(text, reason = "not known") {
  return (cell) => (row) => {
    const words = row.version === null ? text(row) : "";
    setText(cell, words ?? "–");
    setAttribute(cell, "title", words === null ? reason : null);
  };
}

function replicasCell(cell) {
  return (row) => {
    const isKnown = row.replicas_desired !== undefined && row.replicas_desired !== null;
    setText(cell, isKnown ? `${count(row.ready_workers ?? row.replicas)} of ${count(row.replicas_desired)}` : "–");
  };
}

function ttftCell(cell) {
  const median = h("span", { class: "line" });
  const tail = h("span", { class: "detail" });
  cell.append(median, tail);
  return (row) => {
    const isModel = row.version === null;
    setText(median, isModel ? (duration(row.ttft_p50_s) ?? "–") : "");
    setText(tail, isModel && duration(row.ttft_p99_s) ? `p99 ${duration(row.ttft_p99_s)}` : "");
    setAttribute(cell, "title", isModel && duration(row.ttft_p50_s) === null ? "no recent call" : null);
  };
}

function nameCell(cell) {
  const name = h("a", { class: "name" });
  const detail = h("span", { class: "detail" });
  cell.append(name, detail);
  return (row) => {
    if (row.version !== null) {
      setText(name, row.version);
      name.href = linkTo("calls", "", { model: row.model });
      setText(detail, `${percent(row.weight)} of calls`);
      return;
    }
    setText(name, row.model);
    name.href = linkTo("calls", "", { model: row.model });
    const aliases = row.aliases?.length ? `also ${row.aliases.join(", ")}` : "";
    setText(detail, [row.only, aliases].filter(Boolean).join(" · "));
  };
}

function stateCell(cell) {
  const chip = stateChip();
  const frozen = h(
    "span",
    { class: "chip", dataset: { tone: "wait" }, title: "No scaling and no rollout until it is unfrozen" },
    "Frozen",
  );
  const quarantined = h("span", { class: "chip", dataset: { tone: "bad" }, title: "It gets no call" }, "Quarantined");
  const reason = h("span", { class: "detail short" });
  const progress = meter();
  cell.append(h("span", { class: "chips" }, chip.node, frozen, quarantined), reason, progress.node);
  return (row) => {
    chip.set(row.state);
    setHidden(frozen, !row.frozen);
    setHidden(quarantined, !row.quarantined);
    setText(reason, row.reason ?? "");
    setHidden(reason, !row.reason);
    setAttribute(reason, "title", row.reason);
    setHidden(progress.node, !row.progress);
    if (row.progress) {
      const { stage, fraction } = row.progress;
      progress.set(fraction === null || fraction === undefined ? stage : `${stage}, ${percent(fraction)}`, fraction);
    }
  };
}

function actionsCell(cell, context) {
  let shown = null;
  const act = modelActions(context);
  const scale = button("Scale", () => act.scale(shown.model), { kind: "small" });
  const freeze = button("Freeze", () => (shown.frozen ? act.unfreeze(shown.model) : act.freeze(shown.model)), {
    kind: "small",
  });
  const buttons = h("span", { class: "buttons" }, scale, freeze);
  cell.append(buttons);
  return (row) => {
    shown = row;
    setHidden(buttons, row.version !== null);
    setText(freeze, row.frozen ? "Unfreeze" : "Freeze");
    setAttribute(scale, "aria-label", `Scale ${row.model}`);
    setAttribute(freeze, "aria-label", `${row.frozen ? "Unfreeze" : "Freeze"} ${row.model}`);
  };
}
