/**
 * Keeps the overview document up to date from the gateway's server-sent events.
 *
 * Events are merged into maps by id as they come; subscribers get the changed ids once a frame.
 */

const LISTS = ["problems", "gateways", "models", "workers", "calls", "tenants", "scaling"];
const STALE_MS = 4000;
const DOWN_MS = 8000;
const MAX_WAIT_MS = 8000;
const HIDDEN_MS = 30_000;

/** @typedef {{isFull: boolean, changed: Record<string, Set<string>>}} Changes */

/** The live overview. `connection`: connecting, live, stale, reconnecting or down. */
export class Feed {
  /** @param {import("./api.js").Api} api @param {() => void} onSignedOut */
  constructor(api, onSignedOut) {
    this._api = api;
    this._onSignedOut = onSignedOut;
    this._subscribers = new Set();
    this._connectionSubscribers = new Set();
    this._source = null;
    this._pending = null;
    this._frame = 0;
    this._retry = 0;
    this._attempts = 0;
    this._receivedAt = 0;
    this._failingSince = 0;
    this._isPaused = false;
    this._hiding = 0;
    this._onLeave = () => this._pause();
    this._onVisibility = () => this._followVisibility();
    this.problem = "";
    this.connection = "connecting";
    this.hasState = false;
    this.facts = {};
    /** @type {Record<string, Map<string, any>>} */
    this.lists = Object.fromEntries(LISTS.map((name) => [name, new Map()]));
  }

  /** Rows of a list, in the order in which the gateway sent them first. */
  rows(name) {
    return [...this.lists[name].values()];
  }

  /** Call `act` with the changes of each frame, and once now if there is a state. Returns a function that ends it. */
  subscribe(act) {
    this._subscribers.add(act);
    if (this.hasState) act({ isFull: true, changed: {} });
    return () => this._subscribers.delete(act);
  }

  /** Call `act` each second and at each change of the connection. Returns a function that ends it. */
  onConnection(act) {
    this._connectionSubscribers.add(act);
    act();
    return () => this._connectionSubscribers.delete(act);
  }

  /** Seconds since the last event; null before the first. */
  ageS() {
    return this._receivedAt ? (performance.now() - this._receivedAt) / 1000 : null;
  }

  start() {
    this._timer = setInterval(() => this._check(), 1000);
    document.addEventListener("visibilitychange", this._onVisibility);
    addEventListener("pagehide", this._onLeave);
    addEventListener("pageshow", this._onVisibility);
    this._connect();
  }

  stop() {
    document.removeEventListener("visibilitychange", this._onVisibility);
    removeEventListener("pagehide", this._onLeave);
    removeEventListener("pageshow", this._onVisibility);
    clearTimeout(this._hiding);
    clearInterval(this._timer);
    clearTimeout(this._retry);
    cancelAnimationFrame(this._frame);
    this._source?.close();
    this._source = null;
    this._subscribers.clear();
    this._connectionSubscribers.clear();
  }

  /**
   * End the stream of a page that is out of sight, and open it again when the page is seen: browsers allow six
   * connections to one HTTP/1.1 server, for all pages together.
   */
  _followVisibility() {
    clearTimeout(this._hiding);
    if (document.hidden) {
      this._hiding = setTimeout(() => this._pause(), HIDDEN_MS);
    } else if (this._isPaused) {
      this._isPaused = false;
      this._setConnection("connecting");
      void this._reconnect();
    }
  }

  _pause() {
    clearTimeout(this._retry);
    this._source?.close();
    this._source = null;
    this._isPaused = true;
  }

  /** Stop: a newer window has the place of this one. Reconnecting by itself would take the place of the next. */
  _replaced() {
    this._pause();
    this.problem = "too many windows show this console. This one goes on when you come back to it or load it again.";
    this._setConnection("stale");
  }

  _connect() {
    this._source?.close();
    const source = new EventSource("/console/events");
    this._source = source;
    const on = (name, act) => source.addEventListener(name, (event) => source === this._source && act(event));
    on("state", (event) => this._apply(JSON.parse(event.data), true));
    on("delta", (event) => this._apply(JSON.parse(event.data), false));
    on("ping", () => this._markReceived());
    on("end", (event) => (JSON.parse(event.data).reason === "replaced" ? this._replaced() : this._failed()));
    on("error", () => this._failed());
  }

  _markReceived() {
    this._receivedAt = performance.now();
    this._attempts = 0;
    this._failingSince = 0;
    this.problem = "";
    this._setConnection("live");
  }

  _apply(document, isFull) {
    this._pending ??= { isFull: false, changed: {} };
    this._pending.isFull ||= isFull;
    for (const name of LISTS) {
      const part = document[name];
      if (part === undefined) {
        if (isFull) this.lists[name].clear();
        continue;
      }
      const changed = (this._pending.changed[name] ??= new Set());
      this.lists[name] = isFull ? new Map() : this.lists[name];
      for (const row of (isFull ? part : part.set) ?? []) {
        this.lists[name].set(row.id, row);
        changed.add(row.id);
      }
      for (const id of (isFull ? null : part.gone) ?? []) {
        this.lists[name].delete(id);
        changed.add(id);
      }
    }
    const facts = isFull ? document : { ...document.cluster, at: document.at };
    for (const [key, value] of Object.entries(facts)) if (!LISTS.includes(key)) this.facts[key] = value;
    this.hasState ||= isFull;
    this._markReceived();
    this._frame ||= requestAnimationFrame(() => this._publish());
  }

  _publish() {
    this._frame = 0;
    const changes = this._pending;
    this._pending = null;
    for (const act of [...this._subscribers]) act(changes);
  }

  async _failed() {
    this._source?.close();
    this._source = null;
    this._failingSince ||= performance.now();
    this._setConnection(this.connection === "down" ? "down" : "reconnecting");
    clearTimeout(this._retry);
    const wait = Math.min(500 * 2 ** this._attempts, MAX_WAIT_MS) * (0.75 + Math.random() / 2);
    this._attempts += 1;
    this._retry = setTimeout(() => this._reconnect(), wait);
  }

  async _reconnect() {
    try {
      const session = await this._api.readSession();
      if (!session.signed_in) return void this._onSignedOut();
      if (this._attempts > 2) this.problem = await refusal();
    } catch {
      this._setConnection(performance.now() - this._failingSince > DOWN_MS ? "down" : "reconnecting");
      return void this._failed();
    }
    this._connect();
  }

  _check() {
    if (this._isPaused) return;
    if (this.connection === "live" && performance.now() - this._receivedAt > STALE_MS) this._setConnection("stale");
    for (const act of this._connectionSubscribers) act();
  }

  _setConnection(state) {
    if (this.connection === state) return;
    this.connection = state;
    for (const act of this._connectionSubscribers) act();
  }
}

/** Return why the gateway refuses the event stream; "" if it does not. EventSource does not report it. */
async function refusal() {
  const stop = new AbortController();
  try {
    const answer = await fetch("/console/events", { credentials: "same-origin", signal: stop.signal });
    if (answer.ok) return "";
    const body = await answer.json();
    return body?.error?.message ?? `HTTP ${answer.status}`;
  } catch {
    return "";
  } finally {
    stop.abort();
  }
}
