"""The section `gateway.console` of cluster.yaml: who may sign in to the console, and what it shows."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

from pydantic import Field, field_validator, model_validator

from cluster.config.section import Section, is_this_host, url_parts

_SCOPE = re.compile(r"[!#-\[\]-~]+")
TRACE_ID = "{trace_id}"


def _secure_url(value: str, why: str) -> str:
    """Return a URL unchanged. Raises ValueError if it is not an https URL; http is allowed only if the URL's host is
    this host. `why`: the text of the error that says why https is needed."""
    parts = url_parts(value)
    if parts.scheme not in ("https", "http") or not parts.hostname:
        raise ValueError(f"{value!r} is no URL of a web server: write https://host")
    if parts.username or parts.password:
        raise ValueError("contains a user name or password: take it out")
    if parts.scheme == "http" and not is_this_host(parts.hostname):
        raise ValueError(f"{value!r}: {why}; http is for this host only")
    return value


class ConsoleOidc(Section):
    """Sign-in with an OpenID issuer: authorization code flow with PKCE. The issuer is one of `auth.oidc`, whose claims
    name the tenant and the role."""

    issuer: str
    """URL of the issuer, equal to `auth.oidc[].issuer` of the issuer that is meant."""
    client_id: Annotated[str, Field(min_length=1, max_length=512)]
    """Client id that the issuer has for the console. Its redirect URI is `public_url` followed by
    `/console/sign-in/oidc/callback`."""
    client_secret_file: Path | None = None
    """File with the client secret. None: a public client, which PKCE alone protects."""
    scopes: Annotated[tuple[str, ...], Field(min_length=1, max_length=20)] = ("openid", "profile")
    """Scopes that are requested; `openid` is one of them."""

    @field_validator("scopes")
    @classmethod
    def _with_openid(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        wrong = [scope for scope in value if not _SCOPE.fullmatch(scope)]
        if wrong:
            raise ValueError(f"{wrong[0]!r} is no scope: letters, digits and punctuation without spaces, quotes or \\")
        if "openid" not in value:
            raise ValueError("must include openid: without it the issuer sends no ID token")
        return value


class Console(Section):
    """The console in the browser, at `/` of the HTTP port. Operators and viewers may sign in; with `tenants`, callers
    and tenant admins may too."""

    enabled: bool = True
    """Serve the console."""
    tenants: bool = False
    """Whether the roles `tenant_admin` and `caller` may sign in. They see their own tenant only."""
    session_s: Annotated[float, Field(ge=60, le=30 * 86_400)] = 28_800.0
    """Seconds after which a person must sign in again."""
    history: bool = True
    """Keep the last hour of the plots in memory."""
    oidc: ConsoleOidc | None = None
    """Sign-in with an OpenID issuer, beside sign-in with a key. Needs `public_url`."""
    public_url: str = ""
    """URL at which browsers reach the HTTP port, such as `https://llm.example.com`; empty: taken from each request.
    Needed for `oidc`, and behind a proxy that changes the header `host`."""
    traces_url: str = ""
    """URL of a trace in the tool that shows traces, with `{trace_id}` in it; empty: no links to traces."""
    prometheus_url: str = ""
    """URL of the Prometheus from which plots of more than an hour come; empty: the last hour only."""

    @property
    def public_host(self) -> str:
        """The host of `public_url`, without its port; "" without a URL."""
        return (url_parts(self.public_url).hostname or "").lower()

    @field_validator("public_url")
    @classmethod
    def _origin(cls, value: str) -> str:
        if not value:
            return value
        parts = url_parts(_secure_url(value, "the session's cookie must be sent over https"))
        if parts.path not in ("", "/") or parts.query or parts.fragment:
            raise ValueError(f"{value!r}: must be a scheme and a host without a path, since the console is at /")
        return value.rstrip("/")

    @field_validator("traces_url")
    @classmethod
    def _with_id(cls, value: str) -> str:
        if not value:
            return value
        parts = url_parts(value)
        if parts.scheme not in ("https", "http") or not parts.hostname:
            raise ValueError(f"{value!r} is no URL of a web server: write https://host/...{TRACE_ID}")
        if TRACE_ID not in value:
            raise ValueError(f"{value!r} holds no {TRACE_ID}: write it where the id of the trace belongs")
        return value

    @field_validator("prometheus_url")
    @classmethod
    def _server(cls, value: str) -> str:
        if value:
            parts = url_parts(value)
            if parts.scheme not in ("https", "http") or not parts.hostname:
                raise ValueError(f"{value!r} is no URL of a web server: write https://host or http://host:port")
        return value.rstrip("/")

    @model_validator(mode="after")
    def _redirect(self) -> Console:
        if self.oidc is not None and not self.public_url:
            raise ValueError("oidc needs public_url: the issuer sends the browser back to it")
        return self
