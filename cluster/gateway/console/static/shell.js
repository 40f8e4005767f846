/** The frame of all pages: navigation, the cluster's name, the connection's state, and who is signed in. */

import { isScoped } from "./api.js";
import { announce, button, h, replace, setAttribute, setHidden, setText } from "./dom.js";
import { age } from "./format.js";
import { themePicker } from "./theme_picker.js";

const PAGES = [
  { name: "fleet", label: "Fleet", scoped: "Models", load: () => import("./fleet.js") },
  { name: "calls", label: "Calls", load: () => import("./calls.js") },
  { name: "tenants", label: "Tenants", scoped: "Tenant", load: () => import("./tenants.js") },
  { name: "scaling", label: "Scaling", load: () => import("./scaling.js"), isHidden: isScoped },
  { name: "playground", label: "Playground", load: () => import("./playground.js") },
];
const ROLES = { operator: "Operator", viewer: "Viewer", tenant_admin: "Tenant administrator", caller: "Caller" };
const CONNECTIONS = {
  connecting: ["Connecting", "busy"],
  live: ["Live", "good"],
  stale: ["Stale", "wait"],
  reconnecting: ["Reconnecting", "wait"],
  down: ["Gateway down", "bad"],
};

/** Shows one page at a time, by the address's part after `#`. */
export class Shell {
  /**
   * @typedef {import("./api.js").Session} Session
   * @typedef {import("./feed.js").Feed} Feed
   * @param {{api: any, session: Session, feed: Feed, signOut: () => void}} context
   */
  constructor(context) {
    this._context = context;
    const isOwn = isScoped(context.session);
    this._pages = PAGES.filter((page) => !page.isHidden?.(context.session)).map((page) => ({
      ...page,
      label: (isOwn && page.scoped) || page.label,
    }));
    this._page = null;
    this._shownName = "";
    this._number = 0;
    this._onHash = () => this._route();
    this._build();
  }

  /** Show the page that the address names, and follow its changes. */
  open() {
    addEventListener("hashchange", this._onHash);
    this._context.feed.onConnection(() => this._showConnection());
    this._route();
  }

  close() {
    removeEventListener("hashchange", this._onHash);
    this._page?.unmount?.();
    this._page = null;
  }

  async _route() {
    const route = routeOf(location.hash);
    const page = this._pages.find((each) => each.name === route.page);
    if (!page) return void location.replace("#/fleet");
    for (const [name, link] of this._links) setAttribute(link, "aria-current", name === page.name ? "page" : null);
    const place = `${route.page}/${route.id}`;
    if (this._shownName === place && this._page?.route) return void this._page.route(route);
    const number = (this._number += 1);
    const isFirst = !this._shownName;
    this._shownName = place;
    this._page?.unmount?.();
    this._page = null;
    const container = h("div", { class: `page page-${page.name}` });
    replace(this._main, container);
    try {
      const module = await page.load();
      if (number !== this._number) return;
      this._page = module.mount(container, this._context, route) ?? null;
    } catch (error) {
      replace(
        container,
        h("h1", { tabindex: "-1" }, page.label),
        h("p", { class: "problem" }, `The page cannot be shown: ${error.message}`),
      );
    }
    const heading = container.querySelector("h1");
    document.title = `${heading?.textContent || page.label} · ${this._context.session.cluster || "Headrace"}`;
    if (!isFirst) {
      scrollTo(0, 0);
      heading?.focus({ preventScroll: true });
    }
  }

  _build() {
    const { session, signOut } = this._context;
    this._links = new Map(this._pages.map((page) => [page.name, h("a", { href: `#/${page.name}` }, page.label)]));
    this._chip = h("span", { class: "chip" });
    this._detail = h("span", { class: "connection-detail" });
    this._banner = h("section", { class: "banner", "aria-label": "Notice", hidden: true });
    this._main = h("main", { id: "main", tabindex: "-1" });
    const skip = button("Skip to the content", () => this._main.focus(), { kind: "skip" });
    const account = h(
      "div",
      { class: "account" },
      h(
        "span",
        { class: "role", title: session.actor },
        ROLES[session.role] ?? session.role,
        session.tenant && ` of ${session.tenant}`,
      ),
      session.auth && button("Sign out", signOut, { kind: "quiet" }),
    );
    this.node = h(
      "div",
      { class: "shell" },
      skip,
      h(
        "header",
        { class: "top" },
        h("a", { class: "brand", href: "#/fleet" }, h("span", { class: "mark", "aria-hidden": "true" }), "Headrace"),
        h("span", { class: "cluster", title: session.version && `Version ${session.version}` }, session.cluster),
        h("span", { class: "connection" }, this._chip, this._detail),
      ),
      h(
        "nav",
        { class: "nav", "aria-label": "Pages" },
        h(
          "ul",
          null,
          [...this._links.values()].map((link) => h("li", null, link)),
        ),
      ),
      h("section", { class: "tools", "aria-label": "Session" }, themePicker(), account),
      h("div", { class: "content" }, this._banner, this._main),
    );
  }

  _showConnection() {
    const { feed } = this._context;
    const [words, tone] = CONNECTIONS[feed.connection];
    if (this._chip.shownText !== undefined && this._chip.shownText !== words) announce(`Connection: ${words}`);
    setText(this._chip, words);
    setAttribute(this._chip, "data-tone", tone);
    const ageS = feed.ageS();
    const isOld = feed.connection !== "live" && feed.connection !== "connecting" && ageS !== null;
    setText(this._detail, isOld ? `data ${age(ageS)} old` : "");
    const banner = this._bannerText(isOld);
    setText(this._banner, banner);
    setHidden(this._banner, !banner);
    setAttribute(this.node, "data-stale", isOld && ageS > 10 ? "true" : null);
  }

  _bannerText(isOld) {
    const { feed, session } = this._context;
    if (feed.problem) return `Live updates are refused: ${feed.problem}`;
    if (feed.connection === "down")
      return "No gateway answers. What you see is the last known state; the console tries again every few seconds.";
    if (isOld) return "";
    const controller = feed.facts.controller;
    if (!feed.hasState || isScoped(session) || !controller) return "";
    if (controller.age_s === null || controller.age_s === undefined)
      return "No controller has connected: models do not start or scale; running calls continue.";
    if (controller.age_s <= 15) return "";
    return `The controller's last report is ${age(controller.age_s)} old: models do not start or scale.`;
  }
}

/** Split `#/calls/abc?state=running` into page, id and query. */
export function routeOf(hash) {
  const [path, query = ""] = hash.replace(/^#\/?/, "").split("?");
  const [page, ...rest] = path.split("/");
  let id = rest.join("/");
  try {
    id = decodeURIComponent(id);
  } catch {
    // An id that is no valid escape is looked up as it is.
  }
  return { page: page || "fleet", id, query: new URLSearchParams(query) };
}

/** Return the address of a page. */
export function linkTo(page, id = "", query = {}) {
  const entries = Object.entries(query).filter(([, value]) => value);
  const text = new URLSearchParams(entries).toString();
  return `#/${page}${id ? `/${encodeURIComponent(id)}` : ""}${text ? `?${text}` : ""}`;
}
