/** Columns of the calls' table. */

import { isScoped } from "./api.js";
import { h, setAttribute, setText, stateChip } from "./dom.js";
import { count, duration, plural, rate, timeOfDay, ZONE } from "./format.js";
import { linkTo } from "./shell.js";

const WORDS = { queued: "Waiting", prefill: "Prefill", running: "Running", resuming: "Resuming" };

/** Return the words for a call's state: of an ended call its outcome. */
export function callState(row) {
  if (row.state !== "ended") return { state: row.state, words: WORDS[row.state] ?? row.state };
  if (row.outcome === "ok") return { state: "ended", words: "Done", tone: "off" };
  const words = (row.outcome || "ended").replaceAll("_", " ");
  return {
    state: row.outcome,
    words: words[0].toUpperCase() + words.slice(1),
    tone: row.outcome === "cancelled" ? "off" : "bad",
  };
}

/** Seconds for which a call waited for a worker, or has waited until now. */
export function queueS(row) {
  if (row.queue_s !== null && row.queue_s !== undefined) return row.queue_s;
  return row.state === "queued" && row.now ? Math.max(row.now - row.arrived_s, 0) : null;
}

/** @returns {import("./table.js").Column[]} */
export function callColumns(session) {
  const number = (key, label, width, sort, text, missing, title) => ({
    key,
    label,
    width,
    isNumber: true,
    sort,
    text,
    missing,
    title,
  });
  return [
    { key: "call", label: "Call", width: 7, sort: (row) => row.id, build: idCell },
    { key: "state", label: "State", width: 8, sort: (row) => callState(row).words, build: stateCell },
    {
      key: "arrived",
      label: `Arrived, ${ZONE}`,
      width: 5,
      isNumber: true,
      sort: (row) => row.arrived_s,
      text: (row) => timeOfDay(row.arrived_s),
    },
    {
      key: "tenant",
      label: "Tenant, model",
      width: 9.4,
      sort: (row) => `${row.tenant} ${row.model}`,
      build: tenantCell,
    },
    number(
      "queue",
      "Queue",
      4.8,
      queueS,
      (row) => duration(queueS(row)),
      "not sent to a worker",
      "Time that the call waited for a worker",
    ),
    number(
      "ttft",
      "TTFT",
      4.8,
      (row) => row.ttft_s,
      (row) => duration(row.ttft_s),
      "no token yet",
      "Time from arrival to the first token",
    ),
    number(
      "tokens",
      "Tokens",
      4.3,
      (row) => row.tokens,
      (row) => count(row.tokens),
      "no token yet",
      "Tokens of the answer",
    ),
    number(
      "rate",
      "Tokens/s",
      4.3,
      (row) => row.tokens_per_s,
      (row) => rate(row.tokens_per_s),
      "not known before the second token",
    ),
    {
      key: "prompt",
      label: "Prompt",
      width: 5.6,
      isNumber: true,
      sort: (row) => row.prompt_tokens,
      build: promptCell,
      title: "Tokens of the prompt, and those of them that were in the worker's cache",
    },
    ...(isScoped(session)
      ? []
      : [{ key: "worker", label: "Worker, reason", width: 7.6, sort: (row) => row.worker, build: workerCell }]),
    number(
      "duration",
      "Duration",
      4.8,
      (row) => row.duration_s,
      (row) => duration(row.duration_s),
      "not known",
    ),
  ];
}

function idCell(cell) {
  const link = h("a", { class: "name mono" });
  const detail = h("span", { class: "detail" });
  cell.append(link, detail);
  return (row) => {
    setText(link, shortId(row.id));
    setAttribute(link, "title", row.id);
    setAttribute(link, "aria-label", `Call ${row.id}`);
    link.href = linkTo("calls", row.id);
    setText(detail, row.api ?? "");
  };
}

/** The part of an id that differs: without the kind before the dash, and at most ten characters. */
function shortId(id) {
  const own = id.replace(/^[a-z]+-/, "");
  return own.length > 10 ? `${own.slice(0, 9)}…` : own;
}

function stateCell(cell) {
  const chip = stateChip();
  const detail = h("span", { class: "detail" });
  cell.append(chip.node, detail);
  return (row) => {
    const { state, words, tone } = callState(row);
    chip.set(state, words, tone);
    setText(detail, row.resumes ? plural(row.resumes, "resume") : "");
  };
}

function tenantCell(cell) {
  const tenant = h("span", { class: "line" });
  const model = h("span", { class: "detail line" });
  cell.append(tenant, model);
  return (row) => {
    setText(tenant, row.tenant);
    setText(model, row.model);
    setAttribute(cell, "title", `${row.tenant}, ${row.model}`);
  };
}

function promptCell(cell) {
  const tokens = h("span", { class: "line" });
  const cached = h("span", { class: "detail" });
  cell.append(tokens, cached);
  return (row) => {
    setText(tokens, count(row.prompt_tokens) ?? "–");
    setText(
      cached,
      row.cached_tokens === null || row.cached_tokens === undefined ? "" : `${count(row.cached_tokens)} cached`,
    );
  };
}

function workerCell(cell) {
  const worker = h("span", { class: "line" });
  const reason = h("span", { class: "detail line" });
  cell.append(worker, reason);
  return (row) => {
    setText(worker, row.worker || "–");
    setAttribute(worker, "title", row.worker ? `${row.worker}, by gateway ${row.gateway}` : "not on a worker");
    setText(reason, (row.reason ?? "").replaceAll("_", " "));
  };
}
