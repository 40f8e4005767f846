/** Columns of the gateways' table. */

import { age, compact, count, isMissing, milliseconds } from "./format.js";

/** @returns {import("./table.js").Column[]} */
export function gatewayColumns() {
  const number = (key, label, width, value, text, title) => ({
    key,
    label,
    width,
    isNumber: true,
    title,
    sort: value,
    text: (row) => (isMissing(value(row)) ? null : text(value(row))),
  });
  return [
    { key: "gateway", label: "Gateway", width: 12, text: (row) => row.id },
    number("streams", "Running", 6, (row) => row.streams, count, "Calls that are open at this gateway"),
    number("queued", "Waiting", 6, (row) => row.queued, count, "Sequences that wait for a worker"),
    number("tokens", "Tokens/s", 6, (row) => row.tokens_per_s, compact),
    number("lag", "Event loop lag", 7, (row) => row.lag_ms, milliseconds, "Delay of the process's event loop"),
    number(
      "age",
      "Reported",
      6,
      (row) => row.age_s,
      (value) => `${age(value)} ago`,
      "Age of the gateway's last report",
    ),
  ];
}
