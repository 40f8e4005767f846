/** The routing decisions of a call, as a list in order of time. */

import { h, scroller } from "./dom.js";
import { count, duration, numberOf } from "./format.js";

/** @param {any} call an ExplainedCall */
export function routeSteps(call) {
  const routes = call.routes ?? [];
  const omitted = numberOf(call.omitted_routes);
  return [
    omitted ? h("p", { class: "hint" }, `${count(omitted)} earlier decisions are no longer remembered.`) : null,
    h("ol", { class: "steps" }, routes.map(step)),
  ];
}

function step(route) {
  const where = route.worker ? `${route.worker}${route.node ? ` on ${route.node}` : ""}` : "a worker";
  const about = route.prediction === "approximate" ? "about " : "";
  const facts = [
    `${count(numberOf(route.tokens))} tokens sent`,
    isSet(route.predicted_cached_tokens) && `${about}${count(route.predicted_cached_tokens)} expected in the cache`,
    isSet(route.cached_tokens) && `${count(route.cached_tokens)} found in the cache`,
    isSet(route.first_output_s) && `first output after ${duration(route.first_output_s)}`,
  ].filter(Boolean);
  return h(
    "li",
    null,
    h("h3", null, `${duration(numberOf(route.after_s))} after the arrival: sent to ${where}`),
    h("p", null, route.why),
    h("p", { class: "hint" }, facts.join(" · ")),
    route.candidates?.length ? candidates(route) : null,
  );
}

function candidates(route) {
  const parts = [...new Set(route.candidates.flatMap((each) => (each.parts ?? []).map((part) => part.name)))];
  const head = ["Worker", "Total", ...parts, "Cached tokens", "Dropped"];
  const rows = route.candidates.map((each) => {
    const values = new Map((each.parts ?? []).map((part) => [part.name, part.value]));
    const cells = [
      count(numberOf(each.total), 2),
      ...parts.map((name) => (values.has(name) ? count(numberOf(values.get(name)), 2) : "–")),
      isSet(each.cached_tokens) ? count(each.cached_tokens) : "–",
    ];
    return h(
      "tr",
      null,
      h("th", { scope: "row" }, each.worker, each.worker === route.worker ? " (chosen)" : ""),
      cells.map((cell) => h("td", { class: "number" }, cell)),
      h("td", null, (each.dropped || "").replaceAll("_", " ")),
    );
  });
  const compared = numberOf(route.compared);
  return h(
    "details",
    null,
    h("summary", null, `${count(route.candidates.length)} of ${count(compared)} compared workers`),
    scroller(
      "Compared workers",
      h(
        "table",
        { class: "plain" },
        h(
          "thead",
          null,
          h(
            "tr",
            null,
            head.map((name, index) =>
              h(
                "th",
                { scope: "col", class: index && index < head.length - 1 ? "number" : null },
                name.replaceAll("_", " "),
              ),
            ),
          ),
        ),
        h("tbody", null, rows),
      ),
    ),
  );
}

const isSet = (value) => value !== undefined && value !== null;
