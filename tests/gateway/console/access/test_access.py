"""Sign-in and sessions of a real gateway: who may sign in, what ends a session, and how requests of other sites
fail."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from cluster.api.outcomes import CallError, Outcome
from cluster.gateway.console.access.sign_in import (
    FAILURES,
    FAILURES_PER_S,
    MAX_SOURCES,
    SIGN_INS,
    SourceLimits,
    source_of_address,
)
from cluster.policy.tenants.identity import key_of
from tests.support.admin import role_key
from tests.support.cluster import LOOPBACK, TestCluster, running_cluster, until
from tests.support.console import HOST, Browser
from tests.support.http import Reply, Wire
from tests.support.keyed import Keyed, eventually, keyed_cluster, keyed_text

POSTS = ["/console/api/Fleet.ListWorkers", "/console/v1/chat/completions", "/console/sign-out"]
GETS = ["/console/session", "/console/v1/models"]


@pytest.fixture(scope="module")
async def keyed(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Keyed]:
    """Provide a gateway at which all roles may sign in."""
    async with keyed_cluster(tmp_path_factory.mktemp("access"), gateway="  console: {tenants: true}\n") as keyed:
        yield keyed


async def signed_in(keyed: Keyed, tenant: str = "ops", role: str = "operator") -> Browser:
    """Return a browser that has signed in with a new key."""
    key = await role_key(keyed.ledger, tenant, role)
    await keyed.until_known(tenant, key)
    browser = Browser(keyed.cluster)
    assert (await browser.sign_in(key)).status == 204
    return browser


def code(reply: Reply) -> tuple[int, str]:
    """Return the status and the code of an error."""
    return reply.status, reply.json["error"]["code"]


# ---- sign-in


async def test_the_cookie_of_a_session(keyed: Keyed) -> None:
    """The session cookie is hidden from scripts and other sites, does not hold the key, and ends with the session."""
    key = await role_key(keyed.ledger, "ops", "operator")
    await keyed.until_known("ops", key)
    browser = Browser(keyed.cluster)
    reply = await browser.fetch("/console/sign-in", {"key": f" {key}\n"})
    name, *attributes = reply.headers["set-cookie"].split("; ")
    assert name.startswith("headrace=")
    assert {"Path=/", "HttpOnly", "SameSite=Strict"} <= set(attributes)
    assert "Secure" not in attributes  # this gateway has no TLS
    assert reply.headers["cache-control"] == "no-store"
    assert key not in str(reply.headers)
    (age_s,) = [int(item.removeprefix("Max-Age=")) for item in attributes if item.startswith("Max-Age=")]
    assert 28_790 <= age_s <= 28_800


async def test_over_tls_the_cookie_is_bound_to_the_host(tmp_path: Path) -> None:
    """With a public URL over https, the cookie has the prefix __Host- and is sent over TLS only."""
    gateway = "  console: {public_url: 'https://llm.example.com'}\n"
    async with keyed_cluster(tmp_path, gateway=gateway) as keyed:
        key = await role_key(keyed.ledger, "ops", "viewer")
        await keyed.until_known("ops", key)
        browser = Browser(keyed.cluster, "llm.example.com")
        reply = await browser.fetch("/console/sign-in", {"key": key}, origin="https://llm.example.com")
        assert reply.headers["set-cookie"].startswith("__Host-headrace=")
        assert reply.headers["set-cookie"].endswith("; Secure")
        assert (await browser.session())["signed_in"]
        browser.cookies["headrace"] = browser.cookies.pop("__Host-headrace")  # as a script of http:// could set it
        assert not (await browser.session())["signed_in"]


@pytest.mark.parametrize(
    ("body", "status", "field"),
    [
        ({"key": "hr_k1_" + "x" * 43}, 401, ""),
        ({"key": "eyJhbGciOiJub25lIn0.e30."}, 401, ""),
        ({"key": "x" * 3000}, 401, ""),
        ({"key": "a key\r\nx: y"}, 401, ""),
        ({"key": ""}, 400, "key"),
        ({"key": 1}, 400, "key"),
        ({"key": None}, 400, "key"),
        ({}, 400, "key"),
        ([], 400, "key"),
        (b"{", 400, ""),
        (b"\xff", 400, ""),
        (b"", 400, ""),
        ({"key": "x" * 5000}, 413, ""),
    ],
)
async def test_wrong_keys(keyed: Keyed, body: Any, status: int, field: str) -> None:
    """A sign-in with a wrong key is refused, and no cookie is set. The error for a malformed body names the field."""
    reply = await Browser(keyed.cluster).fetch("/console/sign-in", body)
    assert (reply.status, reply.json["error"]["field"]) == (status, field)
    assert "set-cookie" not in reply.headers


async def test_a_form_cannot_sign_in(keyed: Keyed) -> None:
    """A sign-in must be JSON, which a form of another site cannot send."""
    browser = Browser(keyed.cluster)
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data"):
        assert (await browser.fetch("/console/sign-in", {"key": "x"}, content_type=kind)).status == 415


@pytest.mark.slow
@pytest.mark.parametrize("role", ["caller", "tenant_admin"])
async def test_tenants_stay_out_unless_allowed(keyed: Keyed, tmp_path: Path, role: str) -> None:
    """If `gateway.console.tenants` is not set, only operators and viewers may sign in. A session that another gateway
    has given to a tenant is refused."""
    browser = await signed_in(keyed, "acme", role)
    async with same_ledger(keyed, tmp_path) as cluster:
        other = Browser(cluster)
        other.cookies = dict(browser.cookies)
        assert not (await other.session())["signed_in"]
        for tenant, own, status in (("acme", role, 403), ("ops", "operator", 204), ("ops", "viewer", 204)):
            key = await role_key(keyed.ledger, tenant, own)
            await until(partial(knows, cluster, key), "the other gateway knows the key")
            assert (await Browser(cluster).sign_in(key)).status == status


def knows(cluster: TestCluster, key: str) -> bool:
    """Return whether a gateway has read a key from the ledger."""
    tenants = cluster.gateway.tenants
    assert tenants is not None
    return key_of(tenants.snapshot(), key, tenants.peppers) is not None


def same_ledger(keyed: Keyed, folder: Path) -> Any:
    """Return the context of a second gateway with the same ledger and secrets, at which tenants may not sign in."""
    more = f"store: {{database_url: 'sqlite:///{keyed.file.parent / 'ledger.db'}'}}\n"
    return running_cluster(folder / "second", keyed_text(folder, more))


async def test_a_session_holds_at_every_gateway(keyed: Keyed, tmp_path: Path) -> None:
    """A session that began at one gateway is valid at another gateway with the same secret."""
    browser = await signed_in(keyed)
    async with same_ledger(keyed, tmp_path) as cluster:
        other = Browser(cluster)
        other.cookies, other.csrf = browser.cookies, browser.csrf
        await eventually(lambda: is_ok(other), "the other gateway has read the ledger")


async def is_ok(browser: Browser) -> bool:
    """Return whether the session of a browser may list the tenants."""
    return (await browser.admin("Tenants.List")).status == 200


@pytest.mark.slow
async def test_a_burst_of_wrong_keys_is_bounded_and_keeps_no_good_key_out(tmp_path: Path) -> None:
    """Of 200 wrong keys that arrive at one moment from an address, ten are looked up and recorded, and the others get
    429 with a wait of seconds. A valid key of that address signs in at once, before and after it."""
    async with keyed_cluster(tmp_path) as keyed:
        key = await role_key(keyed.ledger, "ops", "operator")
        await keyed.until_known("ops", key)
        wires = [await Wire.open(keyed.cluster) for _ in range(200)]
        body = b'{"key": "hr_wrong"}'
        for wire in wires:  # the heads first: no sign-in may count only once its body is there
            wire.ask("/console/sign-in", b"", content_type="application/json", content_length=str(len(body)), host=HOST)
        assert (await Browser(keyed.cluster).sign_in(key)).status == 204
        before = failures(keyed)
        for wire in wires:
            wire.writer.write(body)
        replies = await asyncio.gather(*(wire.reply() for wire in wires))
        statuses = [reply.status for reply in replies]
        assert int(FAILURES) <= statuses.count(401) <= FAILURES + 5  # 5: of a machine that takes 25 s for all of them
        assert statuses.count(401) + statuses.count(429) == len(wires)
        waits = [int(reply.headers["retry-after"]) for reply in replies if reply.status == 429]
        assert 1 <= min(waits) <= max(waits) <= 1 / FAILURES_PER_S
        assert (await Browser(keyed.cluster).sign_in(key)).status == 204
        await asyncio.gather(*(wire.close() for wire in wires))
        assert failures(keyed) - before == statuses.count(401)


def failures(keyed: Keyed) -> int:
    """Return the number of failures in the audit log."""
    keyed.door.audit.flush()
    return len(keyed.ledger.audit.list(kind="auth_failure", limit=1000))


async def test_sign_ins_of_one_key_are_bounded(keyed: Keyed) -> None:
    """A key that signs in again and again must wait, since each sign-in is recorded. Other keys need not."""
    keys = [await role_key(keyed.ledger, "acme", "caller") for _ in range(2)]
    for key in keys:
        await keyed.until_known("acme", key)
    browser = Browser(keyed.cluster)
    statuses = [(await browser.fetch("/console/sign-in", {"key": keys[0]})).status for _ in range(int(SIGN_INS) + 10)]
    assert statuses[: int(SIGN_INS)] == [204] * int(SIGN_INS)
    assert statuses[-1] == 429
    assert (await browser.sign_in(keys[1])).status == 204


def test_limits_by_source() -> None:
    """Attempts count separately for each IPv4 address and each IPv6 network. Refused ones do not count, so the wait is
    bounded. The memory for them is bounded."""
    limits = SourceLimits(FAILURES_PER_S, FAILURES, "wait")
    blocked = [source_of_address(address) for address in ("192.0.2.1", "2001:db8::2")]
    for source in ("192.0.2.1", source_of_address("2001:db8::1")):
        for _ in range(int(FAILURES)):
            limits.charge(source, 0.0)
    for source in blocked * 1000:
        with pytest.raises(CallError) as caught:
            limits.charge(source, 0.0)
        assert (caught.value.outcome, caught.value.retry_after_s) == (Outcome.RATE_LIMITED, 1 / FAILURES_PER_S)
    for source in blocked:
        limits.charge(source, 1 / FAILURES_PER_S)
    for free in ("192.0.2.2", "2001:db8:0:1::1", "", "no address"):
        limits.charge(source_of_address(free), 0.0)
    for number in range(MAX_SOURCES):
        limits.charge(f"10.0.{number // 256}.{number % 256}", 0.0)
    limits.charge("192.0.2.1", 0.0)


async def test_sign_ins_are_in_the_audit(keyed: Keyed) -> None:
    """A sign-in is in the audit log with the key's id."""
    browser = await signed_in(keyed)
    actor = (await browser.session())["actor"]
    keyed.door.audit.flush()
    events = keyed.ledger.audit.list(equal={"action": "console.sign_in"}, limit=100)
    assert actor in {event["actor"] for event in events}


# ---- what ends a session


async def test_sign_out(keyed: Keyed) -> None:
    """A sign-out removes the cookie from the browser. It needs the CSRF token."""
    browser = await signed_in(keyed)
    assert code(await browser.fetch("/console/sign-out", method="POST", x_csrf_token="x")) == (403, "CSRF")
    assert browser.cookies
    reply = await browser.fetch("/console/sign-out", method="POST")
    assert (reply.status, browser.cookies) == (204, {})
    assert not (await browser.session())["signed_in"]
    assert (await browser.fetch("/console/sign-out", method="POST")).status == 204


async def test_a_revoked_key_ends_its_sessions(keyed: Keyed) -> None:
    """The session of a revoked key ends at its next request. The answer makes the browser delete the cookie."""
    browser = await signed_in(keyed, "left", "tenant_admin")
    key_id = (await browser.session())["actor"].removeprefix("key:")
    await asyncio.to_thread(keyed.ledger.keys.revoke, "left", key_id)

    async def is_out() -> bool:
        return code(await browser.admin("Catalog.List")) == (401, "UNAUTHENTICATED")

    await eventually(is_out, "the session has ended")
    assert (await browser.fetch("/console/v1/models")).status == 401
    assert not (await browser.session())["signed_in"]
    assert not browser.cookies


async def test_a_suspended_tenants_sessions_end(keyed: Keyed) -> None:
    """The sessions of a suspended tenant are refused while it is suspended."""
    browser = await signed_in(keyed, "fallen", "tenant_admin")
    await keyed.suspend("fallen")

    async def is_out() -> bool:
        return (await browser.admin("Tenants.List")).status == 403

    await eventually(is_out, "the session has ended")
    assert (await browser.fetch("/console/v1/models")).status == 403
    await keyed.suspend("fallen", False)
    await eventually(lambda: is_ok(browser), "the tenant is back")


async def test_a_key_keeps_no_role_in_its_cookie(keyed: Keyed) -> None:
    """If two browsers exchange their session cookies, they also exchange their tenants and roles.

    A request with the CSRF token of another session is refused.
    """
    viewer, admin = await signed_in(keyed, "ops", "viewer"), await signed_in(keyed, "acme", "tenant_admin")
    viewer.cookies, admin.cookies = admin.cookies, viewer.cookies
    assert code(await viewer.admin("Tenants.List")) == (403, "CSRF")
    assert (await viewer.session())["tenant"] == "acme"
    assert (await admin.session())["tenant"] == "ops"


# ---- other sites


@pytest.mark.parametrize("path", POSTS)
async def test_the_csrf_token_is_required(keyed: Keyed, path: str) -> None:
    """A POST without the session's CSRF token, or with the token of another session, is refused."""
    browser, other = await signed_in(keyed), await signed_in(keyed)
    for token in ("", "x", other.csrf, browser.csrf[:-1], browser.csrf + "x", "é"):
        reply = await browser.fetch(path, {}, x_csrf_token=token)
        assert reply.status == 403
        assert reply.json["error"]["code"] in ("CSRF", "csrf")


@pytest.mark.parametrize(
    "headers",
    [
        {"origin": "https://evil.example"},
        {"origin": "null"},
        {"origin": f"http://{HOST}.evil.example"},
        {"origin": "http://127.0.0.1:8001"},
        {"origin": HOST},
        {"sec_fetch_site": "cross-site"},
        {"sec_fetch_site": "same-site"},
    ],
)
@pytest.mark.parametrize("path", [*POSTS, *GETS, "/console/sign-in"])
async def test_requests_of_other_sites_are_refused(keyed: Keyed, path: str, headers: dict[str, str]) -> None:
    """A request that another site has caused is refused, even with the valid cookie and CSRF token."""
    browser = await signed_in(keyed)
    reply = await browser.fetch(path, None if path in GETS else {"key": "x"}, **headers)
    assert reply.status == 403
    assert reply.json["error"]["code"].lower() == "cross_site"


async def test_the_own_site_may(keyed: Keyed) -> None:
    """Requests of the console's own page are answered. So are requests of programs, which have no Origin header."""
    browser = await signed_in(keyed)
    for headers in ({"sec_fetch_site": "same-origin"}, {"origin": f"HTTP://{HOST}"}, {"sec_fetch_site": "none"}):
        assert (await browser.fetch("/console/api/Tenants.List", {}, **headers)).status == 200


# ---- without auth


async def test_without_auth_everybody_is_an_operator(cluster: TestCluster) -> None:
    """Without `auth` a session begins without a sign-in, has the role operator, and still needs its CSRF token."""
    browser = Browser(cluster)
    assert code(await browser.admin("Fleet.ListWorkers")) == (401, "UNAUTHENTICATED")
    session = await browser.session()
    assert (session["signed_in"], session["role"], session["auth"]) == (True, "operator", False)
    assert session["sign_in"] == {"key": False, "oidc": False}
    assert (await browser.admin("Fleet.ListWorkers")).status == 200
    assert (await browser.session())["csrf"] == session["csrf"]
    assert (await browser.fetch("/console/api/Fleet.ListWorkers", {}, x_csrf_token="")).status == 403
    assert code(await browser.fetch("/console/sign-in", {"key": "x"})) == (409, "NO_AUTH")
    assert code(await browser.admin("Tenants.List")) == (400, "UNIMPLEMENTED")


@pytest.mark.parametrize(
    "host",
    [
        *("evil.example", "evil.example:8000", "test", "127.0.0.1.evil.example", "[::1", "[::1].evil.example"),
        *(
            "[::1]evil.example:80",
            "[127.0.0.1]",
            "127.0.0.1:80@evil.example",
            "::1",
            "localhost.evil.example",
            "[evil]",
        ),
    ],
)
async def test_without_auth_names_are_refused(cluster: TestCluster, host: str) -> None:
    """Without `auth`, a request is refused unless its Host header is an IP address or localhost. Otherwise another site
    could point its own name at the gateway's address."""
    browser = Browser(cluster, host)
    assert code(await browser.fetch("/console/session")) == (421, "MISDIRECTED")


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST.:8000", "127.0.0.1", "[::1]:8000", "a.localhost:1"])
async def test_without_auth_addresses_are_answered(cluster: TestCluster, host: str) -> None:
    """Without `auth`, the console answers a request whose Host header is an IP address or localhost."""
    assert (await Browser(cluster, host).session())["signed_in"]


async def test_without_auth_configured_names_are_answered(tmp_path: Path) -> None:
    """Without `auth`, the console answers at the names in `gateway.host_names` and at no others."""
    text = LOOPBACK.replace("gateway:\n", "gateway:\n  host_names: [laptop.example]\n")
    async with running_cluster(tmp_path, text) as cluster:
        assert (await Browser(cluster, "Laptop.example:8000").session())["signed_in"]
        assert (await Browser(cluster, "example").fetch("/console/session")).status == 421


async def test_a_session_without_auth_is_none_with_auth(cluster: TestCluster, keyed: Keyed) -> None:
    """A session of a gateway without `auth` is refused by a gateway with `auth`."""
    browser, other = Browser(cluster), Browser(keyed.cluster)
    await browser.session()
    other.cookies = dict(browser.cookies)
    assert not (await other.session())["signed_in"]


async def test_switched_off(tmp_path: Path) -> None:
    """With `enabled: false` there is no console, and the other APIs are unchanged."""
    async with keyed_cluster(tmp_path, gateway="  console: {enabled: false}\n") as keyed:
        browser = Browser(keyed.cluster)
        for path in ("/", "/console/session", "/console/static/app.js", "/console/api/Fleet.ListWorkers"):
            assert (await browser.fetch(path)).status == 404
        assert (await browser.fetch("/health")).status == 200
