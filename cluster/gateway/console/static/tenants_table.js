/** Columns of the tenants' table, and the words for limits. */

import { h, meter, setAttribute, setHidden, setText, stateChip } from "./dom.js";
import { compact, count, duration, money, percent, rate } from "./format.js";
import { linkTo } from "./shell.js";

const LIMITS = {
  requests_per_minute: "Calls a minute",
  tokens_per_minute: "Tokens a minute",
  concurrent_requests: "Concurrent calls",
  daily_tokens: "Tokens of the day",
  monthly_tokens: "Tokens of the month",
};

/** The words for a limit's name. */
export function limitWords(name) {
  return LIMITS[name] ?? name[0].toUpperCase() + name.slice(1).replaceAll("_", " ");
}

/** The limits with their used part, the nearest to its end first. */
export function limitUses(limits) {
  return Object.entries(limits ?? {})
    .map(([name, { used, limit }]) => ({
      name,
      used,
      limit,
      part: limit && used !== null && used !== undefined ? used / limit : null,
    }))
    .sort((a, b) => (b.part ?? -1) - (a.part ?? -1));
}

/** Colour of a used part: a warning from 85 %, an alarm from 100 %. */
export function useTone(part) {
  if (part === null || part < 0.85) return "";
  return part >= 1 ? "bad" : "wait";
}

/** @returns {import("./table.js").Column[]} */
export function tenantColumns() {
  const number = (key, label, width, text, sort, missing, title) => ({
    key,
    label,
    width,
    isNumber: true,
    text,
    sort,
    missing,
    title,
  });
  return [
    { key: "tenant", label: "Tenant", width: 10, sort: (row) => row.id, build: nameCell },
    number(
      "running",
      "Running",
      4.6,
      (row) => count(row.running),
      (row) => row.running,
      "no calls since the gateways' start",
    ),
    number(
      "waiting",
      "Waiting",
      4.6,
      (row) => count(row.waiting),
      (row) => row.waiting,
      "no calls since the gateways' start",
    ),
    number(
      "rate",
      "Tokens/s",
      4.8,
      (row) => rate(row.tokens_per_s),
      (row) => row.tokens_per_s,
      "no calls since the gateways' start",
    ),
    {
      key: "share",
      label: "Service",
      width: 8.4,
      isNumber: false,
      sort: (row) => row.gap,
      build: shareCell,
      title: "The tenant's part of the service against its fair share. Sorted by the gap between them",
    },
    {
      key: "ttft",
      label: "TTFT",
      width: 5.4,
      isNumber: true,
      sort: (row) => row.ttft_p50_s,
      build: ttftCell,
      title: "Time to first token of recent calls: median and 99th percentile. Sorted by the median",
    },
    {
      key: "limit",
      label: "Nearest limit",
      width: 9.4,
      sort: (row) => limitUses(row.limits)[0]?.part,
      build: limitCell,
      title: "The limit of which the largest part is used",
    },
    {
      key: "budget",
      label: "Budget",
      width: 7.6,
      sort: (row) => (row.budget ? row.budget.used / row.budget.limit : null),
      build: budgetCell,
    },
    number(
      "cost",
      "Cost/h",
      4.8,
      (row) => count(row.cost_per_h, 2),
      (row) => row.cost_per_h,
      "no prices are configured",
    ),
  ];
}

function nameCell(cell) {
  const name = h("a", { class: "name" });
  const suspended = stateChip();
  const detail = h("span", { class: "detail" });
  cell.append(name, detail, suspended.node);
  suspended.set("SUSPENDED", "Suspended", "bad");
  return (row) => {
    setText(name, row.id);
    name.href = linkTo("tenants", row.id);
    setText(
      detail,
      row.weight === null || row.weight === undefined
        ? ""
        : `weight ${count(row.weight, Number.isInteger(row.weight) ? 0 : 2)}`,
    );
    setHidden(suspended.node, !row.isSuspended);
  };
}

function shareCell(cell) {
  const bar = meter();
  cell.append(bar.node);
  return (row) => {
    const isKnown = row.share !== null && row.share !== undefined;
    const fair = row.fair_share === null || row.fair_share === undefined ? "" : ` of ${percent(row.fair_share)}`;
    bar.set(
      isKnown ? `${percent(row.share)}${fair}` : "–",
      isKnown && row.fair_share ? row.share / row.fair_share : 0,
      0,
    );
    setAttribute(bar.node, "title", isKnown ? "The bar is full at the fair share" : "the tenant is not active");
  };
}

function ttftCell(cell) {
  const median = h("span", { class: "line" });
  const tail = h("span", { class: "detail" });
  cell.append(median, tail);
  return (row) => {
    setText(median, duration(row.ttft_p50_s) ?? "–");
    setText(tail, duration(row.ttft_p99_s) ? `p99 ${duration(row.ttft_p99_s)}` : "");
    setAttribute(cell, "title", duration(row.ttft_p50_s) ? null : "no recent call");
  };
}

function limitCell(cell) {
  const bar = meter();
  const detail = h("span", { class: "detail line" });
  cell.append(bar.node, detail);
  return (row) => {
    const nearest = limitUses(row.limits)[0];
    setText(detail, nearest ? limitWords(nearest.name) : "");
    setAttribute(
      bar.node,
      "title",
      nearest ? `${count(nearest.used) ?? "an unknown part"} of ${count(nearest.limit)}` : "no limit is set",
    );
    bar.set(percent(nearest?.part) ?? "–", nearest?.part ?? 0, 0, useTone(nearest?.part ?? null));
  };
}

function budgetCell(cell) {
  const bar = meter();
  const detail = h("span", { class: "detail line" });
  cell.append(bar.node, detail);
  return (row) => {
    const { used, limit } = row.budget ?? {};
    const part = row.budget && limit ? used / limit : null;
    bar.set(percent(part) ?? "–", part ?? 0, 0, useTone(part));
    setText(detail, row.budget ? `of ${budgetWords(row.budget, true)}` : "");
    setAttribute(bar.node, "title", row.budget ? `${count(used)} of ${budgetWords(row.budget)}` : "no budget is set");
  };
}

/** The budget's limit with its unit. */
export function budgetWords({ limit, currency }, isShort = false) {
  if (currency && currency !== "tokens") return money(limit, currency);
  return `${isShort ? compact(limit) : count(limit)} tokens`;
}
