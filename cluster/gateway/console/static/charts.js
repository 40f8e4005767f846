/** Line charts over time, drawn as SVG, with the same figures as a table for screen readers. */

import { h, replace, setAttribute, setText, svg } from "./dom.js";
import { dateTime, dayMonth, hourMinute, timeOfDay } from "./format.js";

const PAD = { left: 50, right: 8, top: 8, bottom: 18 };
const TABLE_ROWS = 12;
const TABLE_MS = 60_000;
const DAY_S = 86_400;
const STEPS_S = [60, 120, 300, 600, 900, 1200, 1800, 3600, 7200, 21_600, 43_200, DAY_S, 2 * DAY_S, 7 * DAY_S];

/** @typedef {{key: string, label: string, tone?: number, isStep?: boolean}} Line */

/** A chart of one or more lines. The value at the pointer is shown in its head, else the newest. */
export class LineChart {
  /**
   * @param {{title: string, lines: Line[], format: (value: number) => string | null, unit?: string, height?: number,
   *   floor?: number, hint?: string, isWhole?: boolean}} options
   * `floor`: the vertical axis reaches at least to it, so that small noise does not fill the chart.
   * `isWhole`: values are whole numbers.
   */
  constructor(options) {
    this._options = { height: 96, floor: 0, unit: "", ...options };
    this._points = {};
    this._width = 0;
    this._tabledAt = 0;
    this._build();
  }

  /** Show these points by line: [epoch_s, value or null], all lines at the same times. */
  set(points) {
    const before = this._spanS();
    this._points = points;
    if (Math.abs(this._spanS() - before) > DAY_S / 24) this._tabledAt = 0;
    this._draw();
  }

  close() {
    this._observer.disconnect();
  }

  _build() {
    const { title, lines, height, hint } = this._options;
    this._values = lines.map((line, index) =>
      h("span", { class: "chart-value", dataset: { line: line.tone ?? index } }),
    );
    this._when = h("span", { class: "chart-when" });
    this._paths = lines.map((line, index) => svg("path", { class: "chart-line", "data-line": line.tone ?? index }));
    this._area = svg("path", { class: "chart-area", "data-line": lines[0].tone ?? 0 });
    this._grid = svg("g", { class: "chart-grid" });
    this._cursor = svg("line", { class: "chart-cursor", visibility: "hidden" });
    this._svg = svg(
      "svg",
      { role: "img", "aria-label": `${title}: no values yet`, height, class: "chart-plot" },
      this._grid,
      this._area,
      this._paths,
      this._cursor,
    );
    this._table = h("div", { class: "visually-hidden" });
    this.node = h(
      "figure",
      { class: "chart" },
      h(
        "figcaption",
        null,
        h("span", { class: "chart-title", title: hint }, title),
        this._when,
        h("span", { class: "chart-values" }, this._values),
      ),
      this._svg,
      this._table,
    );
    this._svg.addEventListener("pointermove", (event) => this._point(event));
    this._svg.addEventListener("pointerleave", () => this._unpoint());
    this._observer = new ResizeObserver(([entry]) => {
      const width = Math.round(entry.contentRect.width);
      if (width === this._width || !width) return;
      this._width = width;
      this._draw();
    });
    this._observer.observe(this._svg);
  }

  _draw() {
    const { lines, height, floor, format, isWhole } = this._options;
    const first = this._points[lines[0].key] ?? [];
    if (!this._width || !first.length) return this._head(null);
    const from = first[0][0];
    const to = first.at(-1)[0];
    let top = floor;
    for (const line of lines)
      for (const [, value] of this._points[line.key] ?? []) if (value !== null && value > top) top = value;
    top = niceTop(top || 1);
    if (isWhole) top = Math.max(Math.ceil(top / 2), 1) * 2;
    const x = (at) => PAD.left + ((at - from) / Math.max(to - from, 1)) * (this._width - PAD.left - PAD.right);
    const y = (value) => height - PAD.bottom - (value / top) * (height - PAD.top - PAD.bottom);
    this._x = x;
    setAttribute(this._svg, "viewBox", `0 0 ${this._width} ${height}`);
    lines.forEach((line, index) => {
      this._paths[index].setAttribute("d", pathOf(this._points[line.key] ?? [], x, y, line.isStep));
    });
    this._area.setAttribute("d", lines[0].isStep ? "" : areaOf(first, x, y));
    this._drawGrid(from, to, top, x, y, format);
    this._head(this._pointed ?? null);
    this._describe();
  }

  _drawGrid(from, to, top, x, y, format) {
    const key = `${this._width} ${top} ${Math.floor(to / 60)} ${Math.floor(from / 60)}`;
    if (key === this._gridKey) return;
    this._gridKey = key;
    const { height } = this._options;
    const parts = [];
    for (const value of [0, top / 2, top]) {
      const at = y(value);
      parts.push(svg("line", { x1: PAD.left, x2: this._width - PAD.right, y1: at, y2: at }));
      parts.push(svg("text", { x: PAD.left - 6, y: at + 3.5, "text-anchor": "end" }, format(value) ?? ""));
    }
    const span = to - from;
    const marks = this._width > 250 ? 5 : 2;
    const step = STEPS_S.find((each) => span / each <= marks) ?? span;
    const zone = new Date(to * 1000).getTimezoneOffset() * 60;
    for (let at = Math.ceil((from - zone) / step) * step + zone; at <= to; at += step) {
      if (x(at) < PAD.left + 14 || x(at) > this._width - 18) continue;
      parts.push(svg("text", { x: x(at), y: height - 4, "text-anchor": "middle" }, timeLabel(at, span)));
    }
    replace(this._grid, parts);
  }

  _spanS() {
    const points = this._points[this._options.lines[0].key] ?? [];
    return points.length ? points.at(-1)[0] - points[0][0] : 0;
  }

  _point(event) {
    const points = this._points[this._options.lines[0].key] ?? [];
    if (!points.length || !this._x) return;
    const box = this._svg.getBoundingClientRect();
    const part = (event.clientX - box.left - PAD.left) / Math.max(box.width - PAD.left - PAD.right, 1);
    this._pointed = Math.round(Math.min(Math.max(part, 0), 1) * (points.length - 1));
    const at = this._x(points[this._pointed][0]);
    for (const name of ["x1", "x2"]) this._cursor.setAttribute(name, at);
    this._cursor.setAttribute("y1", PAD.top);
    this._cursor.setAttribute("y2", this._options.height - PAD.bottom);
    this._cursor.setAttribute("visibility", "visible");
    this._head(this._pointed);
  }

  _unpoint() {
    this._pointed = undefined;
    this._cursor.setAttribute("visibility", "hidden");
    this._head(null);
  }

  _head(index) {
    const { lines, format, unit } = this._options;
    lines.forEach((line, number) => {
      const points = this._points[line.key] ?? [];
      const value = index === null ? newest(points) : (points[index]?.[1] ?? null);
      const words = value === null ? "–" : `${format(value)}${unit ? ` ${unit}` : ""}`;
      setText(this._values[number], lines.length > 1 ? `${line.label} ${words}` : words);
      setAttribute(this._values[number], "title", value === null ? "no value at this time" : null);
    });
    const at = index === null ? null : (this._points[lines[0].key]?.[index]?.[0] ?? null);
    const isLong = this._spanS() > DAY_S;
    setText(this._when, at === null ? "" : isLong ? dateTime(at) : timeOfDay(at));
  }

  _describe() {
    if (performance.now() - this._tabledAt < TABLE_MS && this._tabledAt) return;
    this._tabledAt = performance.now();
    const { title, lines, format, unit } = this._options;
    const first = this._points[lines[0].key];
    const parts = lines.map((line) => {
      const values = (this._points[line.key] ?? []).map(([, value]) => value).filter((value) => value !== null);
      if (!values.length) return `${line.label}: no values`;
      const last = values.at(-1);
      return `${line.label}: now ${format(last)} ${unit}, least ${format(least(values))}, most ${format(most(values))}`;
    });
    const timeWords = this._spanS() > DAY_S ? dateTime : hourMinute;
    const span = `${timeWords(first[0][0])} to ${timeWords(first.at(-1)[0])}`;
    this._svg.setAttribute("aria-label", `${title}, ${span}. ${parts.join(". ")}.`);
    const stride = Math.max(Math.floor(first.length / TABLE_ROWS), 1);
    const rows = [];
    for (let index = first.length - 1; index >= 0 && rows.length < TABLE_ROWS; index -= stride) {
      const cells = lines.map((line) => h("td", null, format(this._points[line.key]?.[index]?.[1] ?? null) ?? "–"));
      rows.push(h("tr", null, h("th", { scope: "row" }, timeWords(first[index][0])), cells));
    }
    const heads = [
      h("th", { scope: "col" }, "Time"),
      lines.map((line) => h("th", { scope: "col" }, unit ? `${line.label}, ${unit}` : line.label)),
    ];
    replace(
      this._table,
      h(
        "table",
        null,
        h("caption", null, `${title} as a table`),
        h("thead", null, h("tr", null, heads)),
        h("tbody", null, rows),
      ),
    );
  }
}

/** The words below the axis: times of a day or less, dates of more. */
function timeLabel(at, spanS) {
  return spanS > 1.5 * DAY_S ? dayMonth(at) : hourMinute(at);
}

const least = (values) => values.reduce((a, b) => Math.min(a, b));
const most = (values) => values.reduce((a, b) => Math.max(a, b));

function newest(points) {
  for (let index = points.length - 1; index >= Math.max(points.length - 6, 0); index -= 1)
    if (points[index][1] !== null) return points[index][1];
  return null;
}

/** Return the smallest of 1, 2, 2.5, 5 times a power of ten that is at least `value`. */
export function niceTop(value) {
  const power = 10 ** Math.floor(Math.log10(value));
  return [1, 2, 2.5, 5, 10].map((factor) => factor * power).find((each) => each >= value * 0.999);
}

function pathOf(points, x, y, isStep) {
  let path = "";
  let before = null;
  for (const [at, value] of points) {
    if (value !== null) {
      const place = `${x(at).toFixed(1)} ${y(value).toFixed(1)}`;
      if (before === null) path += `M${place}h0`;
      else path += isStep && before !== value ? `L${x(at).toFixed(1)} ${y(before).toFixed(1)}L${place}` : `L${place}`;
    }
    before = value;
  }
  return path;
}

function areaOf(points, x, y) {
  let path = "";
  let run = [];
  const close = () => {
    if (run.length > 1) {
      path += `M${x(run[0][0]).toFixed(1)} ${y(0).toFixed(1)}`;
      for (const [at, value] of run) path += `L${x(at).toFixed(1)} ${y(value).toFixed(1)}`;
      path += `L${x(run.at(-1)[0]).toFixed(1)} ${y(0).toFixed(1)}Z`;
    }
    run = [];
  };
  for (const point of points) point[1] === null ? close() : run.push(point);
  close();
  return path;
}
