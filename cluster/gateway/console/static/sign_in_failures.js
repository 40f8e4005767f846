/** Why a sign-in with an OpenID provider failed. The gateway sends the browser back with `?sign_in_failed=<reason>`. */

const AGAIN = "Sign in again.";

const TEXTS = {
  busy: "The gateway is handling many sign-ins. Wait a moment and sign in again.",
  denied: `Your organisation's sign-in was cancelled or refused. ${AGAIN}`,
  exchange: `The gateway could not complete the sign-in with your organisation. ${AGAIN}`,
  expired: `The sign-in took too long, or was begun in another browser. ${AGAIN}`,
  issuer: `The answer came from another provider than expected. ${AGAIN}`,
  no_code: `Your organisation's answer was incomplete. ${AGAIN}`,
  no_token: `Your organisation's answer was incomplete. ${AGAIN}`,
  nonce: `The sign-in does not belong to this browser. ${AGAIN}`,
  role: "Your role may not use this console. Ask the cluster's operators.",
  state: `The sign-in does not belong to this browser. ${AGAIN}`,
  suspended: "Your tenant is suspended. Ask the cluster's operators.",
  tenant: "Your account belongs to no tenant of this cluster. Ask the cluster's operators.",
  token: "The gateway does not accept your account. Ask the cluster's operators.",
  unavailable: "Your organisation's sign-in cannot be reached from the gateway. Try again later.",
};

/** Return the text about a failed sign-in, "" without one, and take the reason out of the address. */
export function failedSignIn() {
  const query = new URLSearchParams(location.search);
  const reason = query.get("sign_in_failed");
  if (reason === null) return "";
  query.delete("sign_in_failed");
  const rest = query.toString();
  history.replaceState(null, "", `${location.pathname}${rest ? `?${rest}` : ""}${location.hash}`);
  return Object.hasOwn(TEXTS, reason) ? TEXTS[reason] : `The sign-in failed. ${AGAIN}`;
}
