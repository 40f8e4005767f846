// Sets the stored theme before the first paint, so that a dark page does not flash light.
// A classic script, not a module.
(() => {
  let theme = null;
  try {
    theme = localStorage.getItem("headrace.theme");
  } catch {
    // Without storage the system's theme is used.
  }
  if (theme === "light" || theme === "dark") document.documentElement.dataset.theme = theme;
})();
