/** The tenants page: service against fair share, limits and budgets now, and who used how much. */

import { isScoped } from "./api.js";
import { h, setText } from "./dom.js";
import { showError } from "./dialog.js";
import { compact, count, plural } from "./format.js";
import { KeyedTable } from "./table.js";
import { mountTenant } from "./tenant.js";
import { tenantColumns } from "./tenants_table.js";
import { usageByTenant } from "./usage.js";

const LIST_MS = 30_000;

/** Show all tenants, or the one in the address. A viewer of one tenant sees that one. */
export function mount(container, context, route) {
  const { session } = context;
  if (isScoped(session)) return mountTenant(container, context, session.tenant);
  return route.id ? mountTenant(container, context, route.id) : new TenantsPage(container, context);
}

class TenantsPage {
  constructor(container, context) {
    this._context = context;
    this._feed = context.feed;
    this._known = new Map();
    this._rows = new Map();
    this._summary = h("p", { class: "summary" });
    this._table = new KeyedTable({
      caption: "Tenants now",
      columns: tenantColumns(),
      sort: { key: "tenant", isDown: false },
      empty: "There is no tenant. Create one with headrace tenants create.",
    });
    this._problem = h("div");
    const usage = h("section", { class: "panel", "aria-labelledby": "usage-title" });
    container.append(
      h("div", { class: "page-head" }, h("h1", { tabindex: "-1" }, "Tenants"), this._summary),
      h(
        "section",
        { class: "panel", "aria-labelledby": "now-title" },
        h("h2", { id: "now-title" }, "Now"),
        this._problem,
        this._table.node,
      ),
      usage,
    );
    if (context.session.auth) {
      usageByTenant(usage, context);
      void this._list();
    } else {
      const words =
        "Without auth in the configuration all calls belong to one tenant, and there are no keys, usage or audit.";
      usage.replaceWith(h("p", { class: "hint" }, words));
    }
    this._unsubscribe = this._feed.subscribe(({ isFull, changed }) => (isFull || changed.tenants) && this._update());
  }

  unmount() {
    clearTimeout(this._timer);
    this._unsubscribe();
    this._isClosed = true;
  }

  /** Read the tenants that exist, since the feed has only those that have sent calls. */
  async _list() {
    try {
      const tenants = await this._context.api.pages("Tenants.List", { page_size: 1000 }, "tenants");
      this._known = new Map(tenants.map((tenant) => [tenant.name.replace(/^tenants\//, ""), tenant]));
      this._problem.replaceChildren();
      this._rows.clear();
      this._update();
    } catch (error) {
      if (error.status !== 501) showError(this._problem, error, () => void this._list());
    }
    if (!this._isClosed) this._timer = setTimeout(() => void this._list(), LIST_MS);
  }

  _update() {
    const live = this._feed.lists.tenants;
    const ids = new Set([...live.keys(), ...this._known.keys()]);
    const rows = [...ids].map((id) => this._row(id, live.get(id), this._known.get(id)));
    this._table.set(rows);
    const active = this._feed.rows("tenants").filter((row) => row.running || row.waiting);
    const rate = active.reduce((sum, row) => sum + (row.tokens_per_s ?? 0), 0);
    setText(
      this._summary,
      `${plural(ids.size, "tenant")} · ${count(active.length)} active · ${compact(rate)} tokens/s`,
    );
  }

  /** The same object as before if nothing changed, so that the table leaves the row alone. */
  _row(id, live, known) {
    const before = this._rows.get(id);
    if (before && before.live === live && before.known === known) return before.row;
    const row = { weight: known?.weight ?? null, ...live, id, isSuspended: Boolean(known?.suspended) };
    this._rows.set(id, { live, known, row });
    return row;
  }
}
