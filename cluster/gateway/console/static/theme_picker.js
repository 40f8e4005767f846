/** The choice of the theme: the system's, light or dark. It is kept in the browser. */

import { h } from "./dom.js";

const KEY = "headrace.theme";

/** Return the stored theme: system, light or dark. */
export function storedTheme() {
  try {
    return localStorage.getItem(KEY) ?? "system";
  } catch {
    return "system";
  }
}

function setTheme(theme) {
  if (theme === "system") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = theme;
  try {
    localStorage.setItem(KEY, theme);
  } catch {
    // Without storage the choice holds until the page is closed.
  }
}

/** Return a labelled select. */
export function themePicker() {
  const select = h(
    "select",
    { on: { change: () => setTheme(select.value) } },
    h("option", { value: "system" }, "System"),
    h("option", { value: "light" }, "Light"),
    h("option", { value: "dark" }, "Dark"),
  );
  select.value = storedTheme();
  return h("label", { class: "theme" }, "Theme ", select);
}
