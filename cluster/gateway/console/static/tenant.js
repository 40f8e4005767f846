/** One tenant: what it gets now, its limits, its usage over time, its keys and its audit log. */

import { isScoped, mayRead } from "./api.js";
import { auditList } from "./audit.js";
import { LineChart } from "./charts.js";
import { confirmDialog, showMessage } from "./dialog.js";
import { button, h, meter, missing, replace, setHidden, setText, stateChip } from "./dom.js";
import { compact, count, duration, numberOf, percent, rate } from "./format.js";
import { History } from "./history.js";
import { chosenSeconds, rangePicker } from "./range_picker.js";
import { KeysPanel } from "./keys.js";
import { linkTo } from "./shell.js";
import { budgetWords, limitUses, limitWords, useTone } from "./tenants_table.js";
import { usageByDay } from "./usage.js";

const REASON = { name: "reason", label: "Reason", hint: "For the audit log." };

/** Show the tenant with this name. */
export function mountTenant(container, context, name) {
  const page = new TenantPage(container, context, name);
  return { unmount: () => page.close() };
}

class TenantPage {
  constructor(container, context, name) {
    this._context = context;
    this._name = name;
    this._tenant = null;
    this._shown = "";
    this._meters = new Map();
    this._suspended = stateChip();
    this._suspended.set("SUSPENDED", "Suspended", "bad");
    this._suspended.node.hidden = true;
    this._suspend = button("Suspend", () => this._askSuspend());
    this._suspend.hidden = true;
    this._facts = h("dl", { class: "facts" });
    this._limits = h("div", { class: "limits" });
    this._policy = h("dl", { class: "facts" });
    this._charts();
    this._build(container);
    this._unsubscribe = context.feed.subscribe(({ isFull, changed }) => (isFull || changed.tenants) && this._update());
  }

  close() {
    this._unsubscribe();
    this._history.stop();
    for (const chart of [this._tokens, this._calls]) chart.close();
  }

  _charts() {
    this._tokens = new LineChart({
      title: "Tokens",
      unit: "tokens/s",
      format: rate,
      floor: 5,
      lines: [{ key: "tokens", label: "Tokens" }],
    });
    this._calls = new LineChart({
      title: "Calls",
      format: (value) => count(value),
      floor: 4,
      isWhole: true,
      lines: [
        { key: "streams", label: "Running" },
        { key: "queue", label: "Waiting", tone: 1 },
      ],
    });
    this._history = new History(this._context.api, {
      series: ["tokens", "streams", "queue"],
      tenant: this._name,
      seconds: chosenSeconds(this._context.session),
    });
    this._history.start((error) => {
      if (error) return;
      this._tokens.set({ tokens: this._history.points("tokens") });
      this._calls.set({ streams: this._history.points("streams"), queue: this._history.points("queue") });
    });
  }

  _build(container) {
    const { session } = this._context;
    const isOwn = session.tenant === this._name && !session.may.fleet;
    const panel = (id, title, ...content) =>
      h(
        "section",
        { class: "panel", "aria-labelledby": id },
        h("h2", { id }, title),
        h("div", { class: "panel-body" }, content),
      );
    container.append(
      ...(isOwn ? [] : [h("p", { class: "crumb" }, h("a", { href: linkTo("tenants") }, "Tenants"))]),
      h(
        "div",
        { class: "page-head" },
        h("h1", { tabindex: "-1" }, this._name),
        this._suspended.node,
        h(
          "span",
          { class: "buttons" },
          h("a", { class: "button", href: linkTo("calls", "", { tenant: this._name }) }, "Calls"),
          this._suspend,
        ),
      ),
      h(
        "div",
        { class: "columns" },
        panel("now", "Now", this._facts),
        panel("limits", "Limits and budget", this._limits),
      ),
      h(
        "section",
        { class: "charts two", "aria-label": "Charts" },
        rangePicker(session, (seconds) => this._history.setSeconds(seconds)),
        this._tokens.node,
        this._calls.node,
      ),
    );
    if (!session.auth || !mayRead(session)) return;
    const usage = h("div", { class: "panel-body" }, h("p", null, "Reading the ledger …"));
    const keys = new KeysPanel(this._context, this._name, () => audit.read());
    const audit = auditList(this._context, this._name);
    container.append(
      keys.node,
      h("section", { class: "panel", "aria-labelledby": "usage" }, h("h2", { id: "usage" }, "Usage and cost"), usage),
      panel("policy", "Policy", this._policy),
      audit.node,
    );
    void usageByDay(usage, this._context, this._name);
    void this._read();
  }

  async _read() {
    try {
      this._tenant = await this._context.api.verb("Tenants.Get", { name: `tenants/${this._name}` });
    } catch (error) {
      return replace(this._policy, h("div", { class: "problem" }, error.message));
    }
    const tenant = this._tenant;
    const isSuspended = Boolean(tenant.suspended);
    setHidden(this._suspended.node, !isSuspended);
    setHidden(this._suspend, !this._context.session.may.tenants || tenant.origin === "file");
    setText(this._suspend, isSuspended ? "Resume" : "Suspend");
    const labels = Object.entries(tenant.labels ?? {}).map(([key, value]) => `${key}=${value}`);
    const facts = [
      ["Priority class", tenant.priority_class || tenant.class],
      ["Weight", count(tenant.weight ?? 1, Number.isInteger(tenant.weight ?? 1) ? 0 : 2)],
      ["Models", tenant.models?.join(", ")],
      ["When a budget is spent", tenant.on_budget === "stop" ? "running calls stop" : "running calls finish"],
      ["Guards", count((tenant.guards ?? []).length)],
      ["Prompts in the log", tenant.log_prompts ? "yes" : "no"],
      ["Labels", labels.join(", ")],
      ["Declared by", tenant.origin === "file" ? "a file, read-only here" : "the admin API"],
      ...Object.entries(tenant.limits ?? {}).map(([name, value]) => [
        `Limit: ${limitWords(name)}`,
        count(numberOf(value)),
      ]),
    ];
    return replace(
      this._policy,
      facts.map(([name, value]) => h("div", null, h("dt", null, name), h("dd", null, value || missing("not set")))),
    );
  }

  _update() {
    const row = this._context.feed.lists.tenants.get(this._name) ?? {};
    const cached = [
      ["Running", count(row.running ?? 0)],
      ["Waiting", count(row.waiting ?? 0)],
      ["Rate", `${rate(row.tokens_per_s ?? 0)} tokens/s`],
      ["First token, p50", duration(row.ttft_p50_s)],
      ["First token, p99", duration(row.ttft_p99_s)],
      ...(isScoped(this._context.session)
        ? []
        : [
            ["Part of the service", percent(row.share, 1)],
            ["Fair share", percent(row.fair_share, 1)],
          ]),
      ["Calls since the start", count(row.requests ?? 0)],
      ["Cost an hour", count(row.cost_per_h, 2)],
    ];
    const key = JSON.stringify(cached);
    if (key !== this._shown) {
      this._shown = key;
      replace(
        this._facts,
        cached.map(([name, value]) =>
          h("div", null, h("dt", null, name), h("dd", null, value ?? missing("not known"))),
        ),
      );
    }
    this._updateLimits(row);
  }

  _updateLimits(row) {
    const uses = limitUses(row.limits).sort((a, b) => a.name.localeCompare(b.name));
    if (row.budget && !row.limits?.[row.budget.name])
      uses.push({ ...row.budget, name: "budget", part: row.budget.limit ? row.budget.used / row.budget.limit : null });
    const names = uses.map((use) => use.name).join(" ");
    if (this._limitNames !== names) {
      this._limitNames = names;
      this._meters = new Map(uses.map((use) => [use.name, meter()]));
      const items = uses.map((use) =>
        h(
          "div",
          null,
          h("dt", null, use.name === "budget" ? "Budget" : limitWords(use.name)),
          h("dd", null, this._meters.get(use.name).node),
        ),
      );
      replace(this._limits, uses.length ? h("dl", { class: "facts" }, items) : h("p", null, "No limit is set."));
    }
    for (const use of uses) {
      const limit = use.name === "budget" ? budgetWords(use) : compact(use.limit);
      this._meters.get(use.name).set(`${compact(use.used) ?? "–"} of ${limit}`, use.part ?? 0, 0, useTone(use.part));
    }
  }

  _askSuspend() {
    const isSuspended = Boolean(this._tenant?.suspended);
    const name = `tenants/${this._name}`;
    return confirmDialog({
      title: `${isSuspended ? "Resume" : "Suspend"} ${this._name}`,
      text: isSuspended
        ? "The tenant may call again."
        : "The tenant's running calls end, and new ones are refused until it is resumed.",
      fields: [{ ...REASON, isRequired: !isSuspended }],
      confirm: isSuspended ? "Resume" : "Suspend",
      isDanger: !isSuspended,
      act: async ({ reason }) => {
        await this._context.api.verb(isSuspended ? "Tenants.Resume" : "Tenants.Suspend", { name, reason });
        showMessage(`${this._name} is ${isSuspended ? "resumed" : "suspended"}`);
        await this._read();
      },
    });
  }
}
