/** Formats numbers, times and units. Each function returns null for a missing value, which is shown as an en dash. */

const LOCALE = "en-GB";
const whole = new Intl.NumberFormat(LOCALE, { maximumFractionDigits: 0 });
const upToOne = new Intl.NumberFormat(LOCALE, { maximumFractionDigits: 1 });
const decimals = [0, 1, 2, 3].map(
  (digits) => new Intl.NumberFormat(LOCALE, { minimumFractionDigits: digits, maximumFractionDigits: digits }),
);
const clock = new Intl.DateTimeFormat(LOCALE, { hour: "2-digit", minute: "2-digit", second: "2-digit" });
const minute = new Intl.DateTimeFormat(LOCALE, { hour: "2-digit", minute: "2-digit" });
const day = new Intl.DateTimeFormat(LOCALE, { day: "numeric", month: "short", year: "numeric" });
const dayOnly = new Intl.DateTimeFormat(LOCALE, { day: "numeric", month: "short" });
const full = new Intl.DateTimeFormat(LOCALE, {
  day: "numeric",
  month: "short",
  year: "numeric",
  hour: "2-digit",
  minute: "2-digit",
  second: "2-digit",
  timeZoneName: "short",
});

const SIZES = [
  { least: 1e12, size: 1e12, unit: "T" },
  { least: 1e9, size: 1e9, unit: "G" },
  { least: 1e6, size: 1e6, unit: "M" },
  { least: 1e4, size: 1e3, unit: "k" },
];

/** Whether a value is not a finite number. */
export const isMissing = (value) =>
  value === null || value === undefined || value === "" || !Number.isFinite(Number(value));

/** The name of the viewer's time zone, such as CET or GMT+1. */
export const ZONE = zoneName();

function zoneName() {
  const parts = new Intl.DateTimeFormat(LOCALE, { timeZoneName: "short" }).formatToParts(new Date());
  return parts.find((part) => part.type === "timeZoneName")?.value ?? "local time";
}

/** A number with thousands separators: 12,345. `digits`: after the decimal point. */
export function count(value, digits = 0) {
  return isMissing(value) ? null : decimals[digits].format(Number(value));
}

/** A large number in few characters: 1.2M. Below 10,000 all digits are shown. */
export function compact(value) {
  if (isMissing(value)) return null;
  const number = Number(value);
  const found = SIZES.find(({ least }) => Math.abs(number) >= least);
  if (!found) return whole.format(number);
  const scaled = number / found.size;
  return `${Math.abs(scaled) < 100 ? upToOne.format(scaled) : whole.format(scaled)}${found.unit}`;
}

/** A rate such as 812 or 3.4, without its unit. */
export function rate(value) {
  if (isMissing(value)) return null;
  const number = Number(value);
  return number !== 0 && Math.abs(number) < 10 ? decimals[1].format(number) : compact(number);
}

/** A part of 1 as percent: 42 %. */
export function percent(value, digits = 0) {
  return isMissing(value) ? null : `${decimals[digits].format(Number(value) * 100)} %`;
}

/** A duration with its unit: 340 ms, 2.34 s, 4 min 12 s, 3 h 5 min, 2 d 4 h. */
export function duration(value) {
  if (isMissing(value)) return null;
  const seconds = Number(value);
  if (seconds < 0.9995) return `${whole.format(seconds * 1000)} ms`;
  if (seconds < 10) return `${decimals[2].format(seconds)} s`;
  if (seconds < 60) return `${decimals[1].format(seconds)} s`;
  if (seconds < 3600) return pair(seconds, 60, "min", 1, "s");
  if (seconds < 86_400) return pair(seconds, 3600, "h", 60, "min");
  return pair(seconds, 86_400, "d", 3600, "h");
}

function pair(seconds, large, largeUnit, small, smallUnit) {
  const big = Math.floor(seconds / large);
  const rest = Math.floor((seconds - big * large) / small);
  return rest ? `${big} ${largeUnit} ${rest} ${smallUnit}` : `${big} ${largeUnit}`;
}

/** An age in whole seconds, minutes or hours: 12 s. */
export function age(seconds) {
  if (isMissing(seconds)) return null;
  return seconds < 60 ? `${Math.max(Math.round(seconds), 0)} s` : duration(Math.round(seconds));
}

/** Milliseconds: 12.3 ms. */
export function milliseconds(value) {
  if (isMissing(value)) return null;
  return Number(value) < 100 ? `${decimals[1].format(value)} ms` : `${whole.format(value)} ms`;
}

/** An amount of money with its currency: 1.23 EUR. */
export function money(value, currency) {
  if (isMissing(value)) return null;
  return `${decimals[2].format(Number(value))}${currency ? ` ${currency}` : ""}`;
}

/** A time of day in the viewer's zone, from seconds since the epoch. */
export function timeOfDay(epochS) {
  return isMissing(epochS) ? null : clock.format(new Date(Number(epochS) * 1000));
}

/** Hours and minutes in the viewer's zone. */
export function hourMinute(epochS) {
  return isMissing(epochS) ? null : minute.format(new Date(Number(epochS) * 1000));
}

/** Day and month in the viewer's zone. */
export function dayMonth(epochS) {
  return isMissing(epochS) ? null : dayOnly.format(new Date(Number(epochS) * 1000));
}

/** Date, time and zone, from seconds since the epoch or an RFC 3339 text. */
export function dateTime(value) {
  const date = dateOf(value);
  return date && full.format(date);
}

/** The date, from seconds since the epoch or an RFC 3339 text. */
export function dateOnly(value) {
  const date = dateOf(value);
  return date && day.format(date);
}

/** Return a Date of seconds since the epoch or of an RFC 3339 text; null for neither. */
export function dateOf(value) {
  if (value === null || value === undefined || value === "") return null;
  const date = typeof value === "number" ? new Date(value * 1000) : new Date(value);
  return Number.isNaN(date.getTime()) ? null : date;
}

/** A day in UTC as the ledger has it, 2026-11-30. `ago`: days before today. */
export function utcDay(ago = 0) {
  return new Date(Date.now() - ago * 86_400_000).toISOString().slice(0, 10);
}

/** Return the number of a message's field: protobuf's JSON has 64-bit numbers as text, and leaves zeros out. */
export function numberOf(value) {
  return value === null || value === undefined ? 0 : Number(value);
}

/** 1 call, 2 calls. */
export function plural(number, one, many = `${one}s`) {
  return `${count(number)} ${Number(number) === 1 ? one : many}`;
}

/** Compare two values for sorting: missing ones last, numbers by size, texts by the alphabet with numbers in them. */
export function compare(a, b) {
  const isNoA = a === null || a === undefined || a === "";
  const isNoB = b === null || b === undefined || b === "";
  if (isNoA || isNoB) return Number(isNoA) - Number(isNoB);
  if (typeof a === "number" && typeof b === "number") return a - b;
  return collator.compare(String(a), String(b));
}

const collator = new Intl.Collator(LOCALE, { numeric: true });
