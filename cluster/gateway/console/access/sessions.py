"""Sessions of the console as sealed cookies. A gateway keeps no list of sessions, so that a request may reach any
process of any gateway.

A session holds the id of the key or the subject that signed in, never the key itself. access.py looks the key or the
tenant up again for each request. So if the key is revoked or the tenant is suspended, the session ends at its next
request.
"""

from __future__ import annotations

import base64
import binascii
import secrets as randomness
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Final, Self

import orjson

from cluster.api.outcomes import CallError, Outcome

if TYPE_CHECKING:
    from cluster.ledger.usage.sealed_records import Envelopes

MAX_COOKIE_CHARS: Final = 4096
CSRF_BYTES: Final = 16


@dataclass(frozen=True, slots=True)
class ConsoleSession:
    """A session of a person in the console. Times are in seconds since the epoch."""

    by: str
    """Kind of credential: `key` or `jwt`; `nobody` at a gateway without `auth`."""
    subject: str
    """Id of the key, or the issuer's subject."""
    tenant: str
    role: str
    """Role of the subject at sign-in. For a session that began with a key, the key's present role is used instead."""
    digest: str
    """Stored digest of the key in hexadecimal; "" for other credentials."""
    csrf: str
    """Token that every request with the method POST repeats in the header x-csrf-token."""
    expires_at_s: float

    @classmethod
    def begin(
        cls, by: str, subject: str, tenant: str, role: str, *, expires_at_s: float, digest: str = "", csrf: str = ""
    ) -> Self:
        """Return a new session. `csrf`: the CSRF token; "" for a new random one."""
        return cls(by, subject, tenant, role, digest, csrf or randomness.token_urlsafe(CSRF_BYTES), expires_at_s)


class SealedCookie:
    """A kind of cookie with sealed values. Values are sealed under the first of the cluster's secrets, and opened under
    any of them."""

    def __init__(self, secrets: Callable[[], Sequence[bytes]], purpose: str) -> None:
        """`secrets`: returns the secrets. It is called when they are first needed, and raises ValueError or OSError if
        there are none. `purpose`: separates the kinds of cookies, so that one kind is never accepted as another."""
        self._secrets = secrets
        self._purpose = purpose

    @cached_property
    def _envelopes(self) -> Envelopes:
        from cluster.ledger.usage.sealed_records import Envelopes

        try:
            return Envelopes(self._secrets(), self._purpose, self._purpose, MAX_COOKIE_CHARS)
        except (ValueError, OSError) as error:
            raise CallError(Outcome.STORE_UNAVAILABLE, f"the console has no secret for its sessions: {error}") from None

    def seal(self, value: Any) -> str:
        """Return a JSON value as the text of a cookie. Raises CallError if there is no secret."""
        return base64.urlsafe_b64encode(self._envelopes.seal(orjson.dumps(value))).decode().rstrip("=")

    def open(self, text: str) -> Any:
        """Return the value of a cookie; None if the cookie was changed or not sealed under these secrets. Raises
        CallError if there is no secret."""
        from cluster.ledger.usage.sealed_records import SealError

        if not text or len(text) > MAX_COOKIE_CHARS or not text.isascii():
            return None
        try:
            sealed = base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True)
            return orjson.loads(self._envelopes.open(sealed))
        except (SealError, binascii.Error, orjson.JSONDecodeError):
            return None


class SessionCookie:
    """The cookie that holds a session."""

    def __init__(self, secrets: Callable[[], Sequence[bytes]], name: str) -> None:
        self._sealed = SealedCookie(secrets, "console-session")
        self.name = name

    def seal(self, session: ConsoleSession) -> str:
        """Return the text of the cookie of a session."""
        return self._sealed.seal(astuple(session))

    def open(self, text: str, now_s: float) -> ConsoleSession | None:
        """Return the session of a cookie; None if the cookie is forged or changed, or the session has expired."""
        value = self._sealed.open(text)
        if not isinstance(value, list) or len(value) != len(ConsoleSession.__slots__):
            return None
        if not all(isinstance(part, str) for part in value[:-1]) or not isinstance(value[-1], float):
            return None
        session = ConsoleSession(*value)
        return session if now_s < session.expires_at_s else None


def cookie_name(is_secure: bool, suffix: str = "") -> str:
    """Return the name of a cookie. With TLS the name has the prefix `__Host-`, because browsers accept a cookie with
    this prefix only over TLS and from the host itself."""
    return f"{'__Host-' if is_secure else ''}headrace{suffix}"


def cookie_in(header: str, name: str) -> str:
    """Return the value of a cookie in a request's header; "" if it is absent."""
    for pair in header.split(";"):
        found, equals, value = pair.strip().partition("=")
        if equals and found == name:
            return value
    return ""


def set_cookie(name: str, value: str, *, max_age_s: float, is_secure: bool, same_site: str = "Strict") -> bytes:
    """Return the value of a header `set-cookie`. `max_age_s` 0 deletes the cookie."""
    parts = [f"{name}={value}", "Path=/", f"Max-Age={int(max_age_s)}", "HttpOnly", f"SameSite={same_site}"]
    return "; ".join([*parts, "Secure"] if is_secure else parts).encode("ascii")
