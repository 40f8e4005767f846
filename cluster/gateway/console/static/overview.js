/** The charts at the head of the fleet page: the last hour, or longer where the gateway has a Prometheus. */

import { isScoped } from "./api.js";
import { LineChart } from "./charts.js";
import { h, setHidden, setText } from "./dom.js";
import { count, duration, percent, rate } from "./format.js";
import { History } from "./history.js";
import { chosenSeconds, rangePicker } from "./range_picker.js";

const SERIES = ["tokens", "ttft_p50", "ttft_p99", "queue", "streams", "fairness_gap", "cache_hits", "cost"];

const CHARTS = [
  {
    title: "Throughput",
    unit: "tokens/s",
    format: rate,
    floor: 10,
    lines: [{ key: "tokens", label: "Tokens" }],
    hint: "Tokens that were delivered to callers, a second",
  },
  {
    title: "TTFT",
    format: duration,
    floor: 0.1,
    lines: [
      { key: "ttft_p50", label: "p50" },
      { key: "ttft_p99", label: "p99", tone: 1 },
    ],
    hint: "Time to first token, from the arrival of a call: median and 99th percentile",
  },
  {
    title: "Calls",
    format: (value) => count(value),
    floor: 4,
    isWhole: true,
    lines: [
      { key: "streams", label: "Running" },
      { key: "queue", label: "Waiting", tone: 1 },
    ],
    hint: "Calls that run, and calls that wait for a worker",
  },
  {
    title: "Fairness gap",
    unit: "U",
    format: (value) => count(value, 2),
    floor: 1,
    lines: [{ key: "fairness_gap", label: "Gap" }],
    hint: "Largest difference in service between two waiting tenants, in U of docs/tenancy.md. Below 1 U is fair",
  },
  {
    title: "Cache hits",
    format: (value) => percent(value),
    floor: 1,
    lines: [{ key: "cache_hits", label: "Hits", tone: 2 }],
    hint: "Part of the prompt tokens that workers found in their KV caches",
  },
  {
    title: "Cost",
    unit: "an hour",
    format: (value) => count(value, value !== 0 && value < 1 ? 3 : 2),
    floor: 0.01,
    lines: [{ key: "cost", label: "Cost", tone: 2 }],
    hint: "GPU time at the prices of the configuration",
  },
];

/** Return the charts and what ends them. A scoped viewer has those of its own calls. */
export function overviewCharts({ api, session }) {
  const shown = isScoped(session) ? CHARTS.filter((chart) => !["Fairness gap", "TTFT"].includes(chart.title)) : CHARTS;
  const charts = shown.map((options) => ({ options, chart: new LineChart(options) }));
  const problem = h("p", { class: "note", hidden: true });
  const history = new History(api, { series: SERIES, seconds: chosenSeconds(session) });
  history.start((error) => {
    setHidden(problem, !error);
    if (error) return setText(problem, `The charts cannot be read: ${error.message}`);
    for (const { options, chart } of charts) chart.set(pointsOf(history, options));
    return undefined;
  });
  const node = h(
    "section",
    { class: "charts", "aria-label": "Charts", dataset: { count: charts.length } },
    rangePicker(session, (seconds) => history.setSeconds(seconds)),
    problem,
    charts.map(({ chart }) => chart.node),
  );
  return {
    node,
    close() {
      history.stop();
      for (const { chart } of charts) chart.close();
    },
  };
}

function pointsOf(history, { lines }) {
  return Object.fromEntries(lines.map((line) => [line.key, history.points(line.key)]));
}
