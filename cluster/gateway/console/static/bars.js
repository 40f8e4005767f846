/** A bar chart of some tens of values, drawn once. */

import { niceTop } from "./charts.js";
import { h, replace, svg } from "./dom.js";

const HEIGHT = 120;
const LEFT = 50;
const BOTTOM = 18;

/**
 * Return the chart. It is drawn anew when its width changes, so that its text keeps its size.
 * @typedef {{label: string, value: number}} Bar
 * @param {{title: string, rows: Bar[], format: (value: number) => string | null, tone?: number}} options
 */
export function barChart({ title, rows, format, tone = 0 }) {
  const most = rows.reduce((best, row) => (row.value > best.value ? row : best), rows[0]);
  const last = rows.at(-1);
  const span = `${rows[0].label} to ${last.label}`;
  const words = `${title}, ${span}. Most: ${format(most.value)} on ${most.label}. Last: ${format(last.value)}.`;
  const plot = svg("svg", { class: "chart-plot", role: "img", "aria-label": words, height: HEIGHT });
  let drawn = 0;
  new ResizeObserver(([entry]) => {
    const width = Math.round(entry.contentRect.width);
    if (width === drawn || !width) return;
    drawn = width;
    plot.setAttribute("viewBox", `0 0 ${width} ${HEIGHT}`);
    replace(plot, marks(rows, format, tone, width));
  }).observe(plot);
  return h("figure", { class: "chart bars" }, h("figcaption", null, h("span", { class: "chart-title" }, title)), plot);
}

/** Return the axes and the bars for a width in pixels. */
function marks(rows, format, tone, width) {
  const top = niceTop(Math.max(...rows.map((row) => row.value)) || 1);
  const wide = (width - LEFT) / Math.max(rows.length, 1);
  const y = (value) => HEIGHT - BOTTOM - (value / top) * (HEIGHT - BOTTOM - 8);
  const grid = [0, top / 2, top].map((value) => [
    svg("line", { x1: LEFT, x2: width, y1: y(value), y2: y(value) }),
    svg("text", { x: LEFT - 6, y: y(value) + 3.5, "text-anchor": "end" }, format(value)),
  ]);
  const labels = rows.map((row, index) =>
    index % 7 === rows.length % 7
      ? svg("text", { x: LEFT + (index + 0.5) * wide, y: HEIGHT - 4, "text-anchor": "middle" }, row.label.slice(5))
      : null,
  );
  const bars = rows.map((row, index) =>
    svg(
      "rect",
      {
        class: "chart-bar",
        "data-line": tone,
        x: LEFT + index * wide + 1.5,
        width: Math.max(wide - 3, 1),
        y: y(row.value),
        height: Math.max(y(0) - y(row.value), 0),
        rx: 1.5,
      },
      svg("title", null, `${row.label}: ${format(row.value)}`),
    ),
  );
  return [svg("g", { class: "chart-grid" }, grid, labels), bars];
}
