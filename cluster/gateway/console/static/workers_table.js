/** Columns of the workers' table, and what operators do with a worker or a node. */

import { confirmDialog, showMessage } from "./dialog.js";
import { button, h, meter, setAttribute, setHidden, setText, stateChip } from "./dom.js";
import { age, count, milliseconds, percent, plural, timeOfDay } from "./format.js";
import { linkTo } from "./shell.js";

const FULL_STEP_MS = 100;

/** @returns {import("./table.js").Column[]} */
export function workerColumns(context) {
  return [
    { key: "worker", label: "Worker", width: 8, sort: (row) => row.id, build: nameCell },
    { key: "model", label: "Model", width: 9, sort: (row) => `${row.model} ${row.version}`, build: modelCell },
    { key: "state", label: "State", width: 8.2, sort: (row) => row.state, build: stateCell },
    {
      key: "sequences",
      label: "Sequences",
      width: 7.8,
      sort: (row) => share(row.running, row.max_num_seqs),
      build: sequencesCell,
      title: "Running sequences of the most that fit, and after + those that wait in the engine",
    },
    {
      key: "kv",
      label: "KV cache",
      width: 5.6,
      sort: (row) => row.kv_usage,
      build: kvCell,
      title: "Used part of the KV cache",
    },
    {
      key: "step",
      label: "Step",
      width: 5.4,
      sort: (row) => row.step_ms,
      build: stepCell,
      title: `Time of an engine step; the bar is full at ${FULL_STEP_MS} ms`,
    },
    { key: "node", label: "Node, GPU", width: 7.6, sort: (row) => row.host || row.node, build: nodeCell },
    {
      key: "links",
      label: "Links",
      width: 3.6,
      isNumber: true,
      title: "Gateways to which the worker is linked",
      sort: (row) => row.links?.length ?? 0,
      build: linksCell,
    },
    ...(context.session.may.fleet
      ? [{ key: "act", label: "", width: 8.8, build: (cell) => actionsCell(cell, context) }]
      : []),
  ];
}

const share = (part, whole) => (whole ? part / whole : null);
const isGone = (row) => row.state === "LOST";

function nameCell(cell) {
  const name = h("a", { class: "name" });
  const detail = h("span", { class: "detail" });
  cell.append(name, detail);
  return (row) => {
    setText(name, row.id);
    name.href = linkTo("calls", "", { worker: row.id });
    setText(detail, row.pod && row.pod !== row.id ? row.pod : "");
  };
}

function modelCell(cell) {
  const name = h("span", { class: "line" });
  const version = h("span", { class: "detail" });
  cell.append(name, version);
  return (row) => {
    setText(name, row.model);
    setAttribute(name, "title", row.model);
    setText(version, row.version ?? "");
  };
}

function stateCell(cell) {
  const chip = stateChip();
  const detail = h("span", { class: "detail" });
  const moved = h("a", { class: "detail", href: linkTo("calls", "", { state: "resumed" }), hidden: true });
  cell.append(chip.node, detail, moved);
  return (row) => {
    chip.set(row.state);
    setHidden(moved, !isGone(row) || !row.resumed);
    if (!isGone(row)) return void setText(detail, "");
    setText(moved, row.resumed ? `${plural(row.resumed, "sequence")} went on elsewhere` : "");
    const words = [timeOfDay(row.lost_at), row.lost_reason, row.resumed ? "" : "no sequence was running"];
    setText(detail, words.filter(Boolean).join(" · "));
  };
}

function sequencesCell(cell) {
  const bar = meter();
  cell.append(bar.node);
  return (row) => {
    if (isGone(row)) return void bar.set("–", 0);
    const waiting = row.waiting ? ` (+${count(row.waiting)})` : "";
    const most = row.max_num_seqs || 1;
    bar.set(`${count(row.running)} / ${count(row.max_num_seqs)}${waiting}`, row.running / most, row.waiting / most);
  };
}

function kvCell(cell) {
  const bar = meter();
  cell.append(bar.node);
  return (row) => {
    if (isGone(row) || row.kv_usage === null || row.kv_usage === undefined) return void bar.set("–", 0);
    bar.set(percent(row.kv_usage), row.kv_usage, 0, row.kv_usage > 0.95 ? "wait" : "");
    setAttribute(bar.node, "title", row.kv_tokens ? `of ${count(row.kv_tokens)} tokens` : null);
  };
}

function stepCell(cell) {
  const bar = meter();
  cell.append(bar.node);
  return (row) => {
    if (isGone(row) || !row.step_ms) return void bar.set("–", 0);
    bar.set(milliseconds(row.step_ms), row.step_ms / FULL_STEP_MS, 0, row.step_ms > FULL_STEP_MS ? "wait" : "");
  };
}

function nodeCell(cell) {
  const name = h("span", { class: "line" });
  const detail = h("span", { class: "detail" });
  cell.append(name, detail);
  return (row) => {
    setText(name, row.host || row.node || "–");
    setText(detail, row.gpu || "no GPU");
    const ray = row.ray_cluster ? `, Ray cluster ${row.ray_cluster}` : "";
    setAttribute(name, "title", row.node ? `Ray node ${row.node}${ray}` : null);
  };
}

function linksCell(cell) {
  return (row) => {
    setText(cell, isGone(row) ? "–" : count(row.links?.length ?? 0));
    setAttribute(cell, "title", row.links?.length ? row.links.join(", ") : null);
  };
}

function actionsCell(cell, context) {
  let shown = null;
  const drain = button("Drain", () => drainDialog(context, shown), { kind: "small" });
  const cordon = button("Cordon", () => cordonDialog(context, shown), { kind: "small" });
  const uncordon = button("Uncordon", () => uncordonDialog(context, shown), { kind: "small" });
  const buttons = h("span", { class: "buttons" }, uncordon, cordon, drain);
  cell.append(buttons);
  return (row) => {
    shown = row;
    const isServing = row.state === "READY";
    const isEnding = row.state === "DRAINING" || row.state === "DRAINED";
    setHidden(buttons, isGone(row));
    setHidden(cordon, !isServing);
    setHidden(uncordon, isServing);
    setHidden(drain, isEnding);
    for (const [node, word] of [
      [drain, "Drain"],
      [cordon, "Cordon"],
      [uncordon, "Uncordon"],
    ])
      setAttribute(node, "aria-label", `${word} ${row.id}`);
  };
}

/** The choice between one worker and all workers of its node. */
function targetField(feed, worker) {
  const node = worker.host || worker.node;
  const beside = feed.rows("workers").filter((row) => (row.host || row.node) === node && row.state !== "LOST").length;
  const options = [[worker.id, `Worker ${worker.id}`]];
  if (node) options.push([node, `Node ${node}: all its workers (${count(beside)})`]);
  return { name: "target", label: "What", type: "radio", options };
}

async function sendVerb({ api }, verb, request, done) {
  const answer = await api.verb(`Fleet.${verb}`, request);
  const number = answer?.workers?.length ?? 0;
  showMessage([`${done}: ${plural(number, "worker")}.`, ...(answer?.notes ?? [])].join(" "));
}

function drainDialog(context, worker) {
  return confirmDialog({
    title: "Drain",
    text: "Drained workers take no new calls. What runs there ends or moves to other workers within the time.",
    fields: [
      targetField(context.feed, worker),
      {
        name: "timeout_s",
        label: "Time in seconds",
        type: "number",
        value: "300",
        attributes: { min: "1", inputmode: "numeric" },
      },
    ],
    confirm: "Drain",
    isDanger: true,
    act: ({ target, timeout_s }) => {
      const limit = Number(timeout_s);
      if (!(limit > 0))
        throw Object.assign(new Error("Time in seconds: enter a number above 0."), { field: "timeout_s" });
      return sendVerb(context, "Drain", { target, timeout_s: limit }, `Draining within ${age(limit)}`);
    },
  });
}

function cordonDialog(context, worker) {
  return confirmDialog({
    title: "Cordon",
    text: "Cordoned workers take no new calls. What runs there stays.",
    fields: [targetField(context.feed, worker)],
    confirm: "Cordon",
    isDanger: true,
    act: ({ target }) => sendVerb(context, "Cordon", { target }, "Cordoned"),
  });
}

function uncordonDialog(context, worker) {
  return confirmDialog({
    title: "Uncordon",
    text: "The workers take new calls again.",
    fields: [targetField(context.feed, worker)],
    confirm: "Uncordon",
    act: ({ target }) => sendVerb(context, "Uncordon", { target }, "Uncordoned"),
  });
}
