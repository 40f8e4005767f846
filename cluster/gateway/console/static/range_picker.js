/** The choice of the charts' range. It is kept while the console is open, for all pages. */

import { h, setAttribute } from "./dom.js";

const RANGES = [
  ["1 hour", 3600],
  ["6 hours", 21_600],
  ["1 day", 86_400],
  ["7 days", 604_800],
  ["30 days", 2_592_000],
];

let chosen = RANGES[0][1];

/** The chosen range in seconds; an hour where the gateway has no Prometheus. */
export function chosenSeconds(session) {
  return session.prometheus ? chosen : RANGES[0][1];
}

/** Return buttons for the range; null where the gateway has no Prometheus. `act` is called with a new choice. */
export function rangePicker(session, act) {
  if (!session.prometheus) return null;
  const buttons = RANGES.map(([label, seconds]) =>
    h("button", { type: "button", class: "button", on: { click: () => choose(seconds) } }, label),
  );
  const mark = () =>
    buttons.forEach((each, index) => setAttribute(each, "aria-pressed", String(RANGES[index][1] === chosen)));
  function choose(seconds) {
    chosen = seconds;
    mark();
    act(seconds);
  }
  mark();
  return h("div", { class: "choice", role: "group", "aria-label": "Range of the charts" }, buttons);
}
