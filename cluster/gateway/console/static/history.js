/**
 * Keeps the gateway's time series. The last hour is read once, then its newest steps every few seconds. Longer ranges
 * come from Prometheus, where the gateway has one, and are read whole once a minute.
 */

const POLL_MS = 5000;
const LONG_POLL_MS = 60_000;
const RECENT_S = 60;
const LEAST_S = 600;
const HOUR_S = 3600;

/** Series of one selection: the whole cluster, a model, or a tenant. Values are null where nothing is known. */
export class History {
  /**
   * @param {import("./api.js").Api} api
   * @param {{series: string[], model?: string, tenant?: string, seconds?: number}} selection
   */
  constructor(api, { series, model = "", tenant = "", seconds = HOUR_S }) {
    this._api = api;
    this._query = { series: series.join(","), model, tenant };
    this._clear(seconds);
  }

  /** Poll until stop() and call `act` after each answer, with an error or null. */
  start(act) {
    this._act = act;
    this._onVisible = () => !document.hidden && this._poll();
    document.addEventListener("visibilitychange", this._onVisible);
    void this._poll();
  }

  stop() {
    this._act = null;
    clearTimeout(this._timer);
    document.removeEventListener("visibilitychange", this._onVisible);
  }

  /** Read another range from now on. */
  setSeconds(seconds) {
    this._clear(seconds);
    if (this._act) void this._poll();
  }

  /** Return points [epoch_s, value or null] of a series, the oldest first: from the first known value of any series. */
  points(name) {
    const values = this._values.get(name);
    const points = [];
    for (let at = this._startS(); at <= this.endS; at += this.stepS) points.push([at, values?.get(at) ?? null]);
    return points;
  }

  _clear(seconds) {
    this._seconds = seconds;
    this._values = new Map(this._query.series.split(",").map((name) => [name, new Map()]));
    this._readAt = 0;
    this.stepS = 5;
    this.endS = 0;
  }

  /** At least LEAST_S are shown, so that a gateway that has just started has a plot and not a dot. */
  _startS() {
    let first = this.endS - Math.min(LEAST_S, this._seconds);
    for (const values of this._values.values())
      for (const [at, value] of values) if (value !== null && at < first) first = at;
    const length = this.endS - Math.max(first, this.endS - this._seconds);
    return this.endS - Math.ceil(length / this.stepS) * this.stepS;
  }

  async _poll() {
    clearTimeout(this._timer);
    const isLong = this._seconds > HOUR_S;
    const seconds = this._seconds;
    let error = null;
    try {
      const now = Date.now() / 1000;
      const gap = this._readAt && !isLong ? Math.ceil(now - this._readAt) + RECENT_S : seconds;
      const answer = await this._api.get("/console/history", { ...this._query, seconds: Math.min(gap, seconds) });
      if (seconds !== this._seconds) return;
      if (isLong) this._clear(seconds);
      this._merge(answer);
      this._readAt = now;
    } catch (problem) {
      if (seconds !== this._seconds) return;
      error = problem;
    }
    if (!this._act) return;
    this._act(error);
    clearTimeout(this._timer);
    if (!document.hidden) this._timer = setTimeout(() => this._poll(), isLong ? LONG_POLL_MS : POLL_MS);
  }

  _merge(answer) {
    this.stepS = answer.step_s;
    const from = Math.round(answer.from_s / this.stepS) * this.stepS;
    for (const [name, values] of Object.entries(answer.series)) {
      const kept = this._values.get(name) ?? new Map();
      this._values.set(name, kept);
      values.forEach((value, index) => kept.set(from + index * this.stepS, value));
      this.endS = Math.max(this.endS, from + (values.length - 1) * this.stepS);
      for (const at of kept.keys()) if (at < this.endS - this._seconds) kept.delete(at);
    }
  }
}
