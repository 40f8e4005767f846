/** One call: its times, why it waited, where its sequences went and why. */

import { isScoped, mayRead } from "./api.js";
import { callState } from "./calls_table.js";
import { confirmDialog, showMessage } from "./dialog.js";
import { button, h, missing, replace, setHidden, stateChip, terminalHint } from "./dom.js";
import { count, dateTime, duration, plural, rate } from "./format.js";
import { routeSteps } from "./routes.js";
import { linkTo } from "./shell.js";

/** Show the call with this id, of its answer or of its request. */
export function mountCall(container, context, id) {
  const page = new CallPage(container, context, id);
  return { unmount: () => page.close() };
}

class CallPage {
  constructor(container, context, id) {
    this._context = context;
    this._feed = context.feed;
    this._id = id;
    this._explained = null;
    this._shown = "";
    this._chip = stateChip();
    this._facts = h("dl", { class: "facts" });
    this._why = h("p", { class: "why" });
    this._routes = h("div", { class: "panel-body" });
    this._trace = h(
      "a",
      { class: "button", target: "_blank", rel: "noopener noreferrer", hidden: true },
      "Open the trace",
    );
    this._abort = button("Abort", () => this._askAbort(), { kind: "danger" });
    this._abort.hidden = true;
    container.append(
      h("p", { class: "crumb" }, h("a", { href: linkTo("calls") }, "Calls")),
      h(
        "div",
        { class: "page-head" },
        h("h1", { tabindex: "-1", class: "mono" }, id),
        this._chip.node,
        h("span", { class: "buttons" }, this._trace, this._abort),
      ),
      h(
        "section",
        { class: "panel", "aria-labelledby": "times" },
        h("h2", { id: "times" }, "Times and tokens"),
        h("div", { class: "panel-body" }, this._why, this._facts),
      ),
    );
    if (mayRead(context.session)) {
      const again = button("Read again", () => void this._explain(), { kind: "quiet" });
      container.append(
        h(
          "section",
          { class: "panel", "aria-labelledby": "routes" },
          h("div", { class: "panel-head" }, h("h2", { id: "routes" }, "Route"), again),
          this._routes,
          h("div", { class: "panel-body" }, terminalHint("headrace", "explain", "request", id)),
        ),
      );
      void this._explain();
    }
    this._unsubscribe = this._feed.subscribe(() => this._update());
  }

  close() {
    this._unsubscribe();
  }

  _row() {
    const own = this._feed.lists.calls.get(this._id);
    return own ?? this._feed.rows("calls").find((row) => row.request_id === this._id) ?? null;
  }

  _update() {
    const row = this._row();
    const call = this._explained;
    if (!row && !call) return;
    const now = this._feed.facts.at;
    const place = row ? `${row.state} ${row.worker} ${row.resumes}` : "";
    if (row && this._place !== undefined && this._place !== place && mayRead(this._context.session))
      void this._explain();
    this._place = place;
    const { state, words, tone } = row
      ? callState(row)
      : callState({ state: call.outcome ? "ended" : "running", outcome: call.outcome });
    this._chip.set(state, words, tone);
    setHidden(this._abort, !(this._context.session.may.fleet && (row ? row.state !== "ended" : !call.outcome)));
    this._showTrace(row);
    const facts = this._factsOf(row, call, now);
    const why = whyItWaited(row, call, this._feed, now);
    const key = JSON.stringify([facts, why]);
    if (key === this._shown) return;
    this._shown = key;
    replace(
      this._facts,
      facts.map(([name, value]) => h("div", null, h("dt", null, name), h("dd", null, value || missing()))),
    );
    this._why.textContent = why;
  }

  _factsOf(row, call, now) {
    const source = row ?? {
      tenant: call.tenant,
      model: call.model,
      request_id: call.request_id,
      arrived_s: call.arrived_at_s,
      gateway: call.gateway,
    };
    const known = row ?? { duration_s: call.duration_s };
    const lasted = known.duration_s ?? (row ? now - row.arrived_s : null);
    const cached = row?.cached_tokens;
    const facts = [
      ["Arrived", dateTime(Number(source.arrived_s))],
      ["Tenant", source.tenant],
      ["Model", source.model],
      ["API", row?.api],
      ["Queue", duration(row?.queue_s ?? call?.routes?.[0]?.after_s)],
      ["Time to first token", duration(row?.ttft_s)],
      ["Duration", duration(lasted)],
      ["Answer", row && `${count(row.tokens)} tokens`],
      ["Rate", row?.tokens_per_s ? `${rate(row.tokens_per_s)} tokens/s` : null],
      ["Prompt", row && `${count(row.prompt_tokens)} tokens`],
      ["Cached", cached === null || cached === undefined ? null : `${count(cached)} tokens`],
      ["Resumes", row && count(row.resumes)],
    ];
    if (!isScoped(this._context.session)) facts.push(["Worker", row?.worker], ["Gateway", source.gateway]);
    return [...facts, ["Request id", source.request_id], ["Trace", row?.trace_id]];
  }

  _showTrace(row) {
    const template = this._context.session.traces_url;
    const isKnown = Boolean(row?.trace_id && /^https?:\/\//.test(template));
    setHidden(this._trace, !isKnown);
    if (isKnown) this._trace.href = template.replaceAll("{trace_id}", encodeURIComponent(row.trace_id));
  }

  async _explain() {
    const { api, session } = this._context;
    try {
      const parent = isScoped(session) ? `tenants/${session.tenant}` : "";
      const answer = await api.verb("Fleet.ExplainRequest", { request_id: this._id, ...(parent && { parent }) });
      const calls = answer?.calls ?? [];
      this._explained = calls.find((call) => call.id === this._id) ?? calls.at(-1) ?? null;
      replace(this._routes, this._explained ? routeSteps(this._explained) : h("p", null, "No route is remembered."));
      this._update();
    } catch (error) {
      const row = this._row();
      if (error.status === 404 && row?.state === "queued")
        replace(this._routes, h("p", null, "The call has not been sent to a worker."));
      else replace(this._routes, h("p", { class: row ? null : "problem" }, error.message));
    }
  }

  _askAbort() {
    const row = this._row();
    const call = row ?? this._explained;
    return confirmDialog({
      title: "Abort the call",
      text: "The caller gets the text so far, then the error CANCELLED.",
      fields: [{ name: "reason", label: "Reason", isRequired: true, hint: "For the audit log." }],
      confirm: "Abort",
      isDanger: true,
      act: async ({ reason }) => {
        const answer = await this._context.api.verb("Fleet.AbortRequest", {
          request_id: call.id || this._id,
          parent: `tenants/${call.tenant}`,
          reason,
        });
        showMessage(`Aborted: ${plural(answer?.aborted ?? 0, "call")}`);
      },
    });
  }
}

/** Return what the call waited or waits for, in one or two sentences. */
function whyItWaited(row, call, feed, now) {
  if (row?.state === "queued")
    return `It has waited for ${duration(now - row.arrived_s)}. ${shortage(row.model, feed)}`;
  const first = call?.routes?.[0];
  const waited = row?.queue_s ?? first?.after_s ?? null;
  if (waited === null) return "";
  const held = first?.wait_s
    ? ` For ${duration(first.wait_s)} of it, it waited for the worker that held its prompt.`
    : "";
  const prefill = row?.ttft_s > waited ? ` Its first token came ${duration(row.ttft_s - waited)} after that.` : "";
  if (waited < 0.05) return `It was sent to a worker without a wait.${prefill}`;
  return `It waited ${duration(waited)} for a worker.${held}${prefill}`;
}

/** Return why the model has no place for a call now, as far as the viewer may know. */
function shortage(name, feed) {
  const model = feed.lists.models.get(name);
  if (!model) return "";
  if (!model.ready_workers) {
    const reason = model.reason ? ` (${model.reason})` : "";
    return `No worker of ${name} is ready: the model is ${model.state.toLowerCase()}${reason}.`;
  }
  const workers = feed.rows("workers").filter((worker) => worker.model === name && worker.state === "READY");
  const used = workers.reduce((sum, worker) => sum + worker.running, 0);
  const places = workers.reduce((sum, worker) => sum + worker.max_num_seqs, 0);
  const load = places ? `, which run ${count(used)} of ${count(places)} sequences` : "";
  const waiting = plural(model.waiting ?? 0, "call");
  return `${waiting} of ${name} wait for ${plural(model.ready_workers, "ready worker")}${load}.`;
}
