/** The newest events of a tenant's audit log. */

import { showError } from "./dialog.js";
import { button, h, replace, scroller } from "./dom.js";
import { dateTime } from "./format.js";

const ROWS = 50;
const HEADS = ["Time", "Action", "Object", "Outcome", "By", "Reason"];

/** Return the panel, and a function that reads it again. */
export function auditList({ api }, tenant) {
  const body = h("div");
  let token = "";
  let shown = [];
  const more = button("Older", () => void read(true), { kind: "quiet" });
  const node = h(
    "section",
    { class: "panel", "aria-labelledby": "audit-title" },
    h(
      "div",
      { class: "panel-head" },
      h("h2", { id: "audit-title" }, "Audit"),
      button("Read again", () => void read(), { kind: "quiet" }),
    ),
    body,
  );

  async function read(isMore = false) {
    try {
      const request = { parent: `tenants/${tenant}`, page_size: ROWS, ...(isMore && token && { page_token: token }) };
      const page = await api.verb("Audit.List", request);
      shown = isMore ? [...shown, ...(page?.events ?? [])] : (page?.events ?? []);
      token = page?.next_page_token ?? "";
      show();
    } catch (error) {
      showError(body, error, () => void read());
    }
  }

  function show() {
    if (!shown.length) return replace(body, h("p", { class: "empty" }, "Nothing is recorded."));
    const rows = shown.map((event) =>
      h(
        "tr",
        null,
        h("td", null, dateTime(event.time) ?? "–"),
        h("td", null, event.action ?? ""),
        h("td", { class: "wrap" }, event.object ?? ""),
        h(
          "td",
          null,
          h("span", { class: "chip", dataset: { tone: event.outcome === "ok" ? "good" : "bad" } }, event.outcome ?? ""),
        ),
        h("td", null, event.actor ?? ""),
        h("td", { class: "wrap" }, event.reason ?? ""),
      ),
    );
    return replace(
      body,
      scroller(
        "Audit events",
        h(
          "table",
          { class: "plain" },
          h(
            "thead",
            null,
            h(
              "tr",
              null,
              HEADS.map((head) => h("th", { scope: "col" }, head)),
            ),
          ),
          h("tbody", null, rows),
        ),
      ),
      token ? h("p", { class: "note" }, more) : null,
    );
  }

  void read();
  return { node, read };
}
