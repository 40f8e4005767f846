/** Requests to the gateway. The session is a cookie that scripts cannot read; each POST carries its CSRF token. */

/** A refused or failed request. `code`: a gRPC status name; `field`: the request's field that was wrong. */
export class ApiError extends Error {
  constructor(message, { code = "UNKNOWN", field = "", status = 0 } = {}) {
    super(message);
    this.code = code;
    this.field = field;
    this.status = status;
  }
}

/** @typedef {{signed_in: boolean, role: string, tenant: string, actor: string, expires_at_s: number, csrf: string,
 *   sign_in: {key: boolean, oidc: boolean}, auth: boolean, may: {fleet: boolean, tenants: boolean, keys: boolean},
 *   traces_url: string, prometheus: boolean, cluster: string, version: string}} Session */

/** Sends requests as the signed-in person. */
export class Api {
  /** @param {() => void} onSignedOut called when the gateway says that the session has ended. */
  constructor(onSignedOut) {
    /** @type {Session | null} */
    this.session = null;
    this._onSignedOut = onSignedOut;
  }

  /** Read the session from the gateway. Raises ApiError with status 0 if no gateway answers. */
  async readSession() {
    this.session = await this._json("/console/session", {});
    return this.session;
  }

  /** Call an admin verb such as "Fleet.Drain" with a request in proto field names. */
  verb(name, request = {}) {
    return this.post(`/console/api/${name}`, request);
  }

  /** Return all rows of a paged verb, at most `most`. */
  async pages(name, request, list, most = 5000) {
    const rows = [];
    let token = "";
    do {
      const page = await this.verb(name, token ? { ...request, page_token: token } : request);
      rows.push(...(page[list] ?? []));
      token = page.next_page_token ?? "";
    } while (token && rows.length < most);
    return rows;
  }

  /** Send JSON, and return the answer's JSON; null for an empty answer. */
  post(path, body) {
    const headers = { "content-type": "application/json" };
    if (this.session?.csrf) headers["x-csrf-token"] = this.session.csrf;
    return this._json(path, { method: "POST", headers, body: JSON.stringify(body ?? {}) });
  }

  /** Return JSON of a GET. */
  get(path, query = {}) {
    const text = new URLSearchParams(Object.entries(query).filter(([, value]) => value !== "")).toString();
    return this._json(text ? `${path}?${text}` : path, {});
  }

  async _json(path, options) {
    let answer;
    try {
      answer = await fetch(path, { credentials: "same-origin", cache: "no-store", ...options });
    } catch {
      throw new ApiError("No gateway answers. Check the connection and try again.", { code: "UNAVAILABLE" });
    }
    const text = await answer.text();
    let body = null;
    try {
      body = text ? JSON.parse(text) : null;
    } catch {
      if (answer.ok) throw new ApiError("The gateway's answer is not JSON.", { status: answer.status });
    }
    if (answer.ok) return body;
    if (answer.status === 401 && this.session?.signed_in) this._onSignedOut();
    const error = body?.error ?? {};
    const message = error.message || `The gateway refused the request (HTTP ${answer.status}).`;
    throw new ApiError(message, { code: error.code, field: error.field, status: answer.status });
  }
}

/** Whether the viewer sees one tenant only. */
export function isScoped(session) {
  return session.role === "tenant_admin" || session.role === "caller";
}

/** Whether the viewer may call admin verbs that read: everybody but holders of a caller's key. */
export function mayRead(session) {
  return session.role !== "caller";
}
