/** A tenant's keys: list, create, rotate, revoke. A secret is shown once, and forgotten when its dialog closes. */

import { copyButton } from "./copy.js";
import { confirmDialog, showMessage, showDialog, showError } from "./dialog.js";
import { button, h, replace, setAttribute, setHidden, stateChip } from "./dom.js";
import { age, dateOf, dateOnly, dateTime } from "./format.js";
import { KeyedTable } from "./table.js";

const DAY_S = 86_400;
const REASON = { name: "reason", label: "Reason", hint: "For the audit log." };
const ROLES = {
  caller: "Caller: may send calls",
  tenant_admin: "Tenant administrator: also manages keys",
  viewer: "Viewer: reads everything",
  operator: "Operator: everything",
};

/** The panel of a tenant's keys. */
export class KeysPanel {
  /** @param {any} context @param {string} tenant @param {() => void} onChange called after a key has changed */
  constructor(context, tenant, onChange) {
    this._context = context;
    this._parent = `tenants/${tenant}`;
    this._onChange = onChange;
    this._mayChange = context.session.may.keys;
    this._table = new KeyedTable({
      caption: "Keys",
      columns: this._columns(),
      sort: { key: "created", isDown: true },
      empty: "The tenant has no key.",
      rowClass: (row) => (row.state === "active" ? "" : "faded"),
    });
    this._body = h("div", null, this._table.node);
    this.node = h(
      "section",
      { class: "panel", "aria-labelledby": "keys-title" },
      h(
        "div",
        { class: "panel-head" },
        h("h2", { id: "keys-title" }, "Keys"),
        this._mayChange && button("Create a key", () => this._create()),
      ),
      this._body,
    );
    void this._read();
  }

  _columns() {
    return [
      { key: "key", label: "Key", width: 9, sort: (row) => row.id, build: nameCell },
      { key: "role", label: "Role", width: 8, text: (row) => row.role.replaceAll("_", " ") },
      { key: "state", label: "State", width: 7, sort: (row) => row.state, build: stateCell },
      {
        key: "created",
        label: "Created",
        width: 8,
        sort: (row) => dateOf(row.create_time)?.getTime() ?? 0,
        text: (row) => dateOnly(row.create_time),
      },
      {
        key: "expires",
        label: "Expires",
        width: 8,
        sort: (row) => dateOf(row.expire_time)?.getTime() ?? null,
        text: (row) => dateOnly(row.expire_time) ?? "never",
      },
      ...(this._mayChange ? [{ key: "act", label: "", width: 9, build: (cell) => this._actions(cell) }] : []),
    ];
  }

  _actions(cell) {
    let shown = null;
    const rotate = button("Rotate", () => this._rotate(shown), { kind: "small" });
    const revoke = button("Revoke", () => this._revoke(shown), { kind: "small" });
    const buttons = h("span", { class: "buttons" }, rotate, revoke);
    cell.append(buttons);
    return (row) => {
      shown = row;
      setHidden(buttons, row.state !== "active");
      setAttribute(rotate, "aria-label", `Rotate key ${row.id}`);
      setAttribute(revoke, "aria-label", `Revoke key ${row.id}`);
    };
  }

  async _read() {
    try {
      const keys = await this._context.api.pages("Keys.List", { parent: this._parent, page_size: 1000 }, "keys");
      replace(this._body, this._table.node);
      this._table.set(
        keys.map((key) => ({
          ...key,
          id: key.name.split("/").pop(),
          role: key.role || "caller",
          state: key.state || "active",
        })),
      );
    } catch (error) {
      showError(this._body, error, () => void this._read());
    }
  }

  _changed() {
    this._onChange();
    return this._read();
  }

  async _create() {
    const roles = this._context.session.role === "operator" ? Object.keys(ROLES) : ["caller", "tenant_admin"];
    const made = await confirmDialog({
      title: `Create a key of ${this._parent.slice("tenants/".length)}`,
      fields: [
        { name: "display_name", label: "What it is for", hint: "Shown in this list, such as ci or notebook." },
        { name: "role", label: "Role", type: "select", options: roles.map((role) => [role, ROLES[role]]) },
        {
          name: "days",
          label: "Expires after days",
          type: "number",
          attributes: { min: "1", inputmode: "numeric" },
          hint: "Empty: never.",
        },
        REASON,
      ],
      confirm: "Create",
      act: ({ display_name, role, days, reason }) => {
        const expire_time = expiry(days);
        const key = { display_name, role, ...(expire_time && { expire_time }) };
        return this._context.api.verb("Keys.Create", { parent: this._parent, key, reason });
      },
    });
    await this._showSecret(made, "The new key");
  }

  async _rotate(row) {
    const made = await confirmDialog({
      title: `Rotate key ${row.id}`,
      text: "A new key with the same role is made. The old one works for a while, so that callers can change.",
      fields: [
        {
          name: "hours",
          label: "The old key works for hours",
          type: "number",
          value: "24",
          attributes: { min: "0", step: "any", inputmode: "decimal" },
        },
        REASON,
      ],
      confirm: "Rotate",
      act: ({ hours, reason }) => {
        const overlap_s = Number(hours) * 3600;
        if (!(overlap_s >= 0))
          throw Object.assign(new Error("Hours: enter a number of 0 or more."), { field: "hours" });
        return this._context.api.verb("Keys.Rotate", { name: row.name, overlap_s, reason });
      },
    });
    await this._showSecret(made, "The new key");
  }

  async _showSecret(made, title) {
    if (!made) return;
    void this._changed();
    const secret = h("p", { class: "secret" }, made.secret);
    await showDialog(
      title,
      "I have stored it",
      h("p", null, "Copy it now: it is not shown again."),
      secret,
      copyButton(() => made.secret, "Copy the key"),
    );
    secret.textContent = "";
    made.secret = "";
  }

  _revoke(row) {
    return confirmDialog({
      title: `Revoke key ${row.id}`,
      text: [
        row.display_name && `The key is for “${row.display_name}”.`,
        "Calls with it are refused within two seconds; running calls end by themselves. This cannot be undone.",
      ]
        .filter(Boolean)
        .join(" "),
      fields: [{ ...REASON, isRequired: true }],
      confirm: "Revoke",
      isDanger: true,
      act: async ({ reason }) => {
        await this._context.api.verb("Keys.Revoke", { name: row.name, reason });
        showMessage(`Key ${row.id} is revoked`);
        await this._changed();
      },
    });
  }
}

function expiry(days) {
  if (!String(days).trim()) return null;
  const number = Number(days);
  if (!(number > 0))
    throw Object.assign(new Error("Expires after days: enter a number above 0, or leave it empty."), { field: "days" });
  return new Date(Date.now() + number * DAY_S * 1000).toISOString();
}

function nameCell(cell) {
  const name = h("span", { class: "name mono" });
  const detail = h("span", { class: "detail" });
  cell.append(name, detail);
  return (row) => {
    name.textContent = row.id;
    detail.textContent = row.display_name ?? "";
  };
}

function stateCell(cell) {
  const chip = stateChip();
  const detail = h("span", { class: "detail" });
  cell.append(chip.node, detail);
  return (row) => {
    const ends = dateOf(row.revoke_time);
    const left = ends ? (ends.getTime() - Date.now()) / 1000 : 0;
    chip.set(row.state);
    detail.textContent =
      row.state === "active" && left > 0
        ? `works for ${age(left)} more`
        : ends
          ? (dateTime(row.revoke_time) ?? "")
          : "";
  };
}
