"""Session cookies: a sealed session opens until it expires. No other text opens."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import astuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.api.outcomes import CallError, Outcome
from cluster.gateway.console.access.sessions import (
    ConsoleSession,
    SealedCookie,
    SessionCookie,
    cookie_in,
    cookie_name,
    set_cookie,
)
from cluster.ledger.usage.sealed_records import Envelopes

NOW = 1_800_000_000.0
OLD, NEW, FOREIGN = b"o" * 32, b"n" * 32, b"f" * 32
SESSION = ConsoleSession.begin("key", "k1", "acme", "viewer", expires_at_s=NOW + 60, digest="ab" * 32)


def cookie(*secrets: bytes) -> SessionCookie:
    """Return the session cookie of a gateway with these secrets."""
    return SessionCookie(lambda: secrets, "headrace")


SEALED = cookie(NEW).seal(SESSION)


def raw(text: str) -> bytes:
    """Return the sealed bytes of a cookie."""
    return base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))


def text_of(data: bytes) -> str:
    """Return sealed bytes as the text of a cookie."""
    return base64.urlsafe_b64encode(data).decode().rstrip("=")


@given(
    texts=st.lists(st.text(max_size=60), min_size=6, max_size=6),
    expires_at_s=st.floats(NOW + 1, NOW + 1e9),
    secrets=st.permutations([OLD, NEW]),
)
def test_every_gateway_opens_a_session(texts: list[str], expires_at_s: float, secrets: Sequence[bytes]) -> None:
    """A session that one gateway has sealed opens unchanged at a gateway that has the same secrets in another order.
    The cookie shows nothing in plain text."""
    by, subject, tenant, role, digest, csrf = (text.encode("utf-8", "replace").decode() for text in texts)
    session = ConsoleSession(by, subject, tenant, role, digest, csrf, expires_at_s)
    sealed = cookie(*secrets).seal(session)
    assert cookie(NEW, OLD).open(sealed, NOW) == session
    assert cookie(FOREIGN).open(sealed, NOW) is None
    assert set(sealed) <= set("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_")


def test_a_session_expires() -> None:
    """A cookie opens until its session expires, and not afterwards."""
    assert cookie(NEW).open(SEALED, SESSION.expires_at_s - 0.001) == SESSION
    assert cookie(NEW).open(SEALED, SESSION.expires_at_s) is None


@given(at=st.integers(0, len(SEALED) - 1), to=st.characters(min_codepoint=33, max_codepoint=126))
def test_a_changed_cookie_is_refused(at: int, to: str) -> None:
    """A cookie with one changed character is refused, unless it still decodes to the same bytes."""
    changed = SEALED[:at] + to + SEALED[at + 1 :]
    try:
        is_same = raw(changed) == raw(SEALED)
    except ValueError:
        is_same = False
    assert (cookie(NEW).open(changed, NOW) is not None) == is_same


@given(st.integers(0, len(SEALED) - 1), st.integers(0, len(SEALED)))
def test_a_part_of_a_cookie_is_refused(begin: int, end: int) -> None:
    """A sealed cookie opens only as a whole. A cookie without its beginning or without its end is refused."""
    part = SEALED[begin:end]
    if raw_or_none(part) != raw(SEALED):
        assert cookie(NEW).open(part, NOW) is None


def raw_or_none(text: str) -> bytes | None:
    """Decode a base64 text. Returns None if the text is not base64."""
    try:
        return raw(text)
    except ValueError:
        return None


@given(st.integers(1, 200), st.integers(1, 200))
def test_parts_of_two_cookies_are_refused(first: int, second: int) -> None:
    """A cookie that joins the beginning of one valid cookie and the end of another is refused."""
    other = raw(cookie(NEW).seal(ConsoleSession.begin("key", "k2", "rival", "operator", expires_at_s=NOW + 60)))
    mixed = raw(SEALED)[:first] + other[-second:]
    assert cookie(NEW).open(text_of(mixed), NOW) is None


@given(st.text(max_size=400) | st.binary(max_size=300).map(text_of))
def test_other_texts_are_refused(text: str) -> None:
    """A text that no gateway has sealed does not open."""
    assert cookie(NEW).open(text, NOW) is None


@pytest.mark.parametrize(
    "value",
    [
        None,
        {},
        [],
        [1, 2, 3, 4, 5, 6, NOW + 60],
        [*astuple(SESSION)[:-1], "soon"],
        [*astuple(SESSION)[:-1], True],
        [*astuple(SESSION), "more"],
    ],
)
def test_sealed_values_of_another_form_are_refused(value: object) -> None:
    """A sealed value that is not a session does not open. Another release may have sealed such a value."""
    sealed = SealedCookie(lambda: (NEW,), "console-session").seal(value)
    assert cookie(NEW).open(sealed, NOW) is None


def test_other_cookies_are_no_sessions() -> None:
    """A value that was sealed for another purpose does not open as a session, even if it holds a session."""
    value = list(astuple(SESSION))
    assert cookie(NEW).open(SealedCookie(lambda: (NEW,), "console-session").seal(value), NOW) == SESSION
    assert cookie(NEW).open(SealedCookie(lambda: (NEW,), "console-oidc").seal(value), NOW) is None
    record = Envelopes([NEW], "sealed-record", "sealed record").seal(b"[]")
    assert cookie(NEW).open(text_of(record), NOW) is None


def test_a_long_cookie_is_refused_unread() -> None:
    """A cookie of more than 4096 characters is refused before it is opened."""
    assert cookie(NEW).open(SEALED + "A" * 4096, NOW) is None


@pytest.mark.parametrize("error", [ValueError("holds no secret"), OSError("read-only")])
def test_without_a_secret_there_are_no_sessions(error: Exception) -> None:
    """A gateway that cannot read its secret reports an error, and uses the secret as soon as it can be read."""

    class File:
        secret = b""

        def read(self) -> Sequence[bytes]:
            if not self.secret:
                raise error
            return [self.secret]

    file = File()
    session_cookie = SessionCookie(file.read, "headrace")
    for attempt in (lambda: session_cookie.seal(SESSION), lambda: session_cookie.open(SEALED, NOW)):
        with pytest.raises(CallError, match=str(error)) as caught:
            attempt()
        assert caught.value.outcome is Outcome.STORE_UNAVAILABLE
    file.secret = NEW
    assert session_cookie.open(SEALED, NOW) == SESSION


def test_csrf_tokens_differ() -> None:
    """Each session has a CSRF token of its own, with at least 128 random bits."""
    tokens = {ConsoleSession.begin("key", "k1", "acme", "viewer", expires_at_s=NOW).csrf for _ in range(100)}
    assert len(tokens) == 100
    assert min(map(len, tokens)) >= 22


def test_attributes() -> None:
    """With TLS, the name of the session cookie begins with `__Host-`, which binds the cookie to the host. Browsers
    accept this name only with the attributes Secure and Path=/ and without a domain."""
    assert cookie_name(True) == "__Host-headrace"
    assert cookie_name(False, "-oidc") == "headrace-oidc"
    header = set_cookie("__Host-headrace", "x", max_age_s=60, is_secure=True).decode()
    assert header == "__Host-headrace=x; Path=/; Max-Age=60; HttpOnly; SameSite=Strict; Secure"
    header = set_cookie("headrace", "x", max_age_s=60.9, is_secure=False, same_site="Lax").decode()
    assert header == "headrace=x; Path=/; Max-Age=60; HttpOnly; SameSite=Lax"


@given(st.text(max_size=100))
def test_a_cookie_is_found_by_its_whole_name(header: str) -> None:
    """A cookie is found by its whole name, even among cookies with similar names."""
    assert cookie_in(f"xheadrace=1; headrace=2; headracex=3; {header}", "headrace") == "2"
    assert cookie_in("", "headrace") == cookie_in("headrace", "headrace") == ""
