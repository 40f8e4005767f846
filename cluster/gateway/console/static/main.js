/** Starts the console: reads the session, then shows the sign-in page or the pages of the cluster. */

import { Api } from "./api.js";
import { announcer, button, h, replace } from "./dom.js";
import { Feed } from "./feed.js";
import { Shell } from "./shell.js";
import { signInPage } from "./sign_in.js";
import { failedSignIn } from "./sign_in_failures.js";

const root = document.getElementById("app");
let feed = null;
let shell = null;

const api = new Api(() => restart("Your session has ended. Sign in again."));

async function restart(notice = "") {
  feed?.stop();
  shell?.close();
  feed = shell = null;
  let session;
  try {
    session = await api.readSession();
  } catch (error) {
    return showUnreachable(error);
  }
  document.title = session.cluster ? `Headrace · ${session.cluster}` : "Headrace";
  if (!session.signed_in) return replace(root, signInPage(api, session, notice, restart));
  feed = new Feed(api, () => restart("Your session has ended. Sign in again."));
  shell = new Shell({ api, session, feed, signOut });
  replace(root, shell.node);
  shell.open();
  feed.start();
}

async function signOut() {
  try {
    await api.post("/console/sign-out");
  } finally {
    await restart("You are signed out.");
  }
}

function showUnreachable(error) {
  replace(
    root,
    h(
      "main",
      { class: "alone" },
      h("h1", null, "No gateway answers"),
      h("p", null, error.status ? error.message : "The console tries again every few seconds."),
      button("Try now", () => restart(), { kind: "primary" }),
    ),
  );
  setTimeout(() => root.querySelector("main.alone") && !shell && restart(), 3000);
}

document.body.append(announcer());
restart(failedSignIn());
