/** Usage from the ledger: who used how much in a period, and a tenant's use by day. */

import { barChart } from "./bars.js";
import { showError } from "./dialog.js";
import { h, replace, scroller, setAttribute } from "./dom.js";
import { compact, count, money, numberOf, percent, utcDay } from "./format.js";
import { linkTo } from "./shell.js";
import { KeyedTable } from "./table.js";

const PERIODS = [
  ["Today", () => [utcDay(0), utcDay(0)]],
  ["Yesterday", () => [utcDay(1), utcDay(1)]],
  ["7 days", () => [utcDay(6), utcDay(0)]],
  ["30 days", () => [utcDay(29), utcDay(0)]],
];
const DAYS = 30;

/** Return what a sum of the ledger counts, as numbers. */
function sumOf(sum) {
  const prompt = numberOf(sum.prompt_tokens);
  const completion = numberOf(sum.completion_tokens);
  return {
    requests: numberOf(sum.requests),
    prompt,
    cached: numberOf(sum.cached_tokens),
    completion,
    tokens: prompt + completion,
    gpu_s: numberOf(sum.gpu_seconds),
    cost: sum.cost === undefined || sum.cost === null ? null : Number(sum.cost),
    currency: sum.currency ?? "",
  };
}

const number = (key, label, width, text, sort, missing) => ({ key, label, width, isNumber: true, text, sort, missing });

function columns() {
  return [
    { key: "tenant", label: "Tenant", width: 10, sort: (row) => row.id, build: nameCell },
    number(
      "tokens",
      "Tokens",
      6,
      (row) => compact(row.tokens),
      (row) => row.tokens,
    ),
    number(
      "prompt",
      "Prompt",
      6,
      (row) => compact(row.prompt),
      (row) => row.prompt,
    ),
    number(
      "cached",
      "Cached",
      5,
      (row) => (row.prompt ? percent(row.cached / row.prompt) : null),
      (row) => row.cached / row.prompt,
      "no prompt",
    ),
    number(
      "completion",
      "Answers",
      6,
      (row) => compact(row.completion),
      (row) => row.completion,
    ),
    number(
      "requests",
      "Calls",
      5.6,
      (row) => compact(row.requests),
      (row) => row.requests,
    ),
    number(
      "gpu",
      "GPU hours",
      6,
      (row) => count(row.gpu_s / 3600, 2),
      (row) => row.gpu_s,
    ),
    number(
      "cost",
      "Cost",
      7,
      (row) => money(row.cost, row.currency),
      (row) => row.cost,
      "no prices are configured",
    ),
  ];
}

function nameCell(cell) {
  const name = h("a", { class: "name" });
  cell.append(name);
  return (row) => {
    name.textContent = row.id === "_idle" ? "Idle replicas" : row.id;
    if (row.id !== "_idle") name.href = linkTo("tenants", row.id);
  };
}

/** Return the ledger's sums, with their cost where the cluster has rates. */
async function sumsOf(api, request) {
  const withCost = !api.hasNoRates; // another request may learn it before this one is answered
  try {
    return await api.pages("Usage.Query", { ...request, cost: withCost, page_size: 1000 }, "sums");
  } catch (error) {
    if (error.field !== "cost" || !withCost) throw error;
    api.hasNoRates = true;
    return sumsOf(api, request);
  }
}

/** Fill a panel with usage by tenant, and buttons for the period. */
export function usageByTenant(panel, { api }) {
  const table = new KeyedTable({
    caption: "Usage by tenant",
    columns: columns(),
    sort: { key: "tokens", isDown: true },
    empty: "Nothing was used in this period.",
  });
  const body = h("div", null, table.node);
  const buttons = PERIODS.map(([label], index) =>
    h(
      "button",
      { type: "button", class: "button", "aria-pressed": "false", on: { click: () => void show(index) } },
      label,
    ),
  );
  panel.append(
    h(
      "div",
      { class: "panel-head" },
      h("h2", { id: "usage-title" }, "Usage"),
      h("div", { class: "choice", role: "group", "aria-label": "Period, days in UTC" }, buttons),
    ),
    body,
  );
  let newest = 0;
  async function show(index) {
    const mine = (newest += 1);
    buttons.forEach((each, at) => setAttribute(each, "aria-pressed", String(at === index)));
    const [since_day, until_day] = PERIODS[index][1]();
    try {
      const sums = await sumsOf(api, { group_by: ["tenant"], since_day, until_day });
      if (mine !== newest) return;
      replace(body, table.node);
      table.set(sums.map((sum) => ({ id: sum.group?.tenant ?? "", ...sumOf(sum) })));
      table.sortNow();
    } catch (error) {
      if (mine === newest) showError(body, error, () => void show(index));
    }
  }
  void show(0);
}

/** Fill a panel with a tenant's tokens and cost of each of the last days. */
export async function usageByDay(panel, { api }, tenant) {
  try {
    const request = {
      parent: `tenants/${tenant}`,
      group_by: ["day"],
      since_day: utcDay(DAYS - 1),
      until_day: utcDay(0),
    };
    const sums = new Map((await sumsOf(api, request)).map((sum) => [sum.group?.day, sumOf(sum)]));
    const days = Array.from({ length: DAYS }, (_, index) => utcDay(DAYS - 1 - index));
    const rows = days.map((day) => ({ label: day, ...(sums.get(day) ?? sumOf({})) }));
    const total = (key) => rows.reduce((sum, row) => sum + (row[key] ?? 0), 0);
    const currency = rows.find((row) => row.currency)?.currency ?? "";
    const hasCost = rows.some((row) => row.cost !== null);
    replace(
      panel,
      h(
        "p",
        { class: "summary" },
        `${compact(total("tokens"))} tokens in ${count(total("requests"))} calls in ${DAYS} days (UTC)`,
        hasCost && `, ${money(total("cost"), currency)}`,
      ),
      h(
        "div",
        { class: "columns" },
        barChart({
          title: "Tokens a day",
          rows: rows.map((row) => ({ label: row.label, value: row.tokens })),
          format: compact,
        }),
        hasCost &&
          barChart({
            title: `Cost a day${currency ? `, ${currency}` : ""}`,
            tone: 2,
            rows: rows.map((row) => ({ label: row.label, value: row.cost ?? 0 })),
            format: (value) => count(value, 2),
          }),
      ),
      dayTable(rows, currency),
    );
  } catch (error) {
    showError(panel, error, () => void usageByDay(panel, { api }, tenant));
  }
}

function dayTable(rows, currency) {
  const used = rows.filter((row) => row.requests).reverse();
  const heads = [
    "Day (UTC)",
    "Calls",
    "Prompt tokens",
    "Cached tokens",
    "Answer tokens",
    "GPU hours",
    currency ? `Cost, ${currency}` : "Cost",
  ];
  const cells = (row) => [
    count(row.requests),
    count(row.prompt),
    count(row.cached),
    count(row.completion),
    count(row.gpu_s / 3600, 2),
    count(row.cost, 2) ?? "–",
  ];
  return h(
    "details",
    null,
    h("summary", null, "Figures"),
    scroller(
      "Usage by day",
      h(
        "table",
        { class: "plain" },
        h(
          "thead",
          null,
          h(
            "tr",
            null,
            heads.map((head, index) => h("th", { scope: "col", class: index ? "number" : null }, head)),
          ),
        ),
        h(
          "tbody",
          null,
          used.map((row) =>
            h(
              "tr",
              null,
              h("th", { scope: "row" }, row.label),
              cells(row).map((cell) => h("td", { class: "number" }, cell)),
            ),
          ),
        ),
      ),
    ),
  );
}
