"""Sign-in with an OpenID issuer: the whole flow with a real issuer, and answers that a sign-in must not accept."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import inspect
import re
import time
import urllib.error
import urllib.parse
import urllib.request
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import jwt
import oidc_provider_mock  # type: ignore[import-untyped]
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from hypothesis import given
from hypothesis import strategies as st

from cluster.config.console import ConsoleOidc
from cluster.gateway.auth.no_redirect import open_no_redirect
from cluster.gateway.auth.oidc import Issuer
from cluster.gateway.console.access import oidc_flow, oidc_sign_in
from cluster.gateway.console.access.oidc_flow import (
    FAILURE_S,
    FLOW_S,
    MAX_EXCHANGES,
    SOURCE_EXCHANGES,
    SOURCE_WAITING,
    ExchangeSlots,
    FlowError,
    FlowState,
    OidcFlow,
)
from cluster.gateway.console.access.sessions import SealedCookie
from cluster.gateway.console.access.sign_in import OIDC_CALLBACK, OIDC_START
from cluster.gateway.console.pages import FOLDER
from cluster.policy.tenants.policy import TenantPolicy
from tests.support.cluster import until
from tests.support.console import HOST, Browser
from tests.support.http import Reply
from tests.support.keyed import SECRET, Keyed, eventually, keyed_cluster

PUBLIC = f"http://{HOST}"
USERS = {
    "ada": {"org": "acme", "role": "operator"},
    "vi": {"org": "acme", "role": "viewer"},
    "carl": {"org": "acme"},
    "eve": {"org": "nowhere", "role": "operator"},
    "nil": {},
}


@pytest.fixture(scope="module")
def issuer() -> Iterator[str]:
    """Provide the URL of a real issuer on loopback."""
    users = [oidc_provider_mock.User(sub=name, claims=claims) for name, claims in USERS.items()]
    with oidc_provider_mock.run_server_in_thread(0, user_claims=users) as server:
        yield f"http://localhost:{server.server_port}"


@asynccontextmanager
async def cluster_at(issuer: str, folder: Path) -> AsyncIterator[Keyed]:
    """Run a gateway whose console trusts the issuer, with the tenant acme."""
    (folder / "client-secret").write_text("s3cret\n")
    gateway = (
        f"  console: {{public_url: '{PUBLIC}', oidc: {{issuer: '{issuer}', client_id: console, "
        f"client_secret_file: {folder / 'client-secret'}}}}}\n"
    )
    (folder / "secret").write_text(SECRET + "\n")
    auth = (
        f"auth: {{cluster_secret_file: {folder / 'secret'}, oidc: [{{issuer: '{issuer}', audience: headrace, "
        "tenant_claim: org, role_claim: role}]}\n"
    )
    async with keyed_cluster(folder, auth, gateway) as keyed:
        await asyncio.to_thread(keyed.ledger.tenants.create, TenantPolicy("acme"))

        async def is_known() -> bool:
            return "acme" in keyed.door.snapshot().tenants

        await eventually(is_known, "the tenant is known")
        yield keyed


@pytest.fixture(scope="module")
async def keyed(issuer: str, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Keyed]:
    """Provide a gateway whose console trusts the issuer."""
    async with cluster_at(issuer, tmp_path_factory.mktemp("oidc")) as keyed:
        yield keyed


async def begin(browser: Browser) -> tuple[str, dict[str, str]]:
    """Begin a sign-in. Return the issuer's URL to which the browser is redirected, and the query parameters of this
    URL."""
    reply = await browser.fetch(OIDC_START)
    assert reply.status == 303
    url = reply.headers["location"]
    return url, dict(urllib.parse.parse_qsl(urllib.parse.urlsplit(url).query))


def at_issuer(url: str, user: str) -> str:
    """Sign in at the issuer as a person does, and return the path to which the issuer redirects the browser back."""
    request = urllib.request.Request(url, urllib.parse.urlencode({"sub": user}).encode())  # noqa: S310 - loopback
    try:
        with open_no_redirect(request, 10) as answer:
            raise AssertionError(answer.read())
    except urllib.error.HTTPError as error:
        with error:
            back = str(error.headers["location"])
    assert back.startswith(f"{PUBLIC}{OIDC_CALLBACK}?")
    return back.removeprefix(PUBLIC)


async def come_back(browser: Browser, user: str) -> Reply:
    """Sign in as a person. Return the gateway's answer to the redirect back, which the browser sends as a request from
    another site."""
    url, _ = await begin(browser)
    return await browser.fetch(await asyncio.to_thread(at_issuer, url, user), sec_fetch_site="cross-site")


# ---- the whole flow


async def test_a_person_signs_in(keyed: Keyed) -> None:
    """A person signs in at the issuer and has the role and the tenant of the token, until the session ends."""
    browser = Browser(keyed.cluster)
    assert (await browser.session())["sign_in"] == {"key": False, "oidc": True}
    reply = await come_back(browser, "ada")
    assert (reply.status, reply.headers["location"]) == (303, "/")
    assert list(browser.cookies) == ["headrace"]
    session = await browser.session()
    assert (session["role"], session["tenant"], session["actor"]) == ("operator", "acme", "jwt:ada")
    assert (await browser.admin("Tenants.List")).status == 200
    keyed.door.audit.flush()
    events = keyed.ledger.audit.list(equal={"action": "console.sign_in"}, limit=10)
    assert "jwt:ada" in {event["actor"] for event in events}


async def test_a_viewer_signs_in(keyed: Keyed) -> None:
    """A person whose token has the role viewer may read, but not change anything."""
    browser = Browser(keyed.cluster)
    await come_back(browser, "vi")
    assert (await browser.session())["role"] == "viewer"
    reply = await browser.admin("Tenants.Suspend", name="tenants/acme", reason="x")
    assert reply.status == 403


@pytest.mark.parametrize(("user", "reason"), [("carl", "role"), ("eve", "tenant"), ("nil", "token")])
async def test_others_may_not(keyed: Keyed, user: str, reason: str) -> None:
    """A person without a role or without a known tenant is not signed in, and the page gets the reason."""
    browser = Browser(keyed.cluster)
    reply = await come_back(browser, user)
    assert (reply.status, reply.headers["location"]) == (303, f"/?sign_in_failed={reason}")
    assert not browser.cookies


async def test_the_request_to_the_issuer(keyed: Keyed) -> None:
    """For each sign-in, the issuer gets a new PKCE challenge, a new state and a new nonce.

    The cookie of the sign-in is HttpOnly and SameSite=Lax, and expires after FLOW_S seconds.
    """
    browser = Browser(keyed.cluster)
    _, first = await begin(browser)
    reply = await browser.fetch(OIDC_START)
    name, *attributes = reply.headers["set-cookie"].split("; ")
    assert name.startswith("headrace-oidc=")
    assert {"HttpOnly", "SameSite=Lax", f"Max-Age={FLOW_S:.0f}", "Path=/"} <= set(attributes)
    second = dict(urllib.parse.parse_qsl(urllib.parse.urlsplit(reply.headers["location"]).query))
    assert first["response_type"] == "code"
    assert first["code_challenge_method"] == "S256"
    assert first["redirect_uri"] == f"{PUBLIC}{OIDC_CALLBACK}"
    assert set(first["scope"].split()) == {"openid", "profile"}
    for name in ("state", "nonce", "code_challenge"):
        assert first[name] != second[name]
        assert len(first[name]) >= 43


async def test_a_code_of_another_browser_is_refused(keyed: Keyed) -> None:
    """If a browser opens the issuer's redirect that was made for another browser, it is not signed in. This holds
    whether or not it has begun a sign-in of its own."""
    attacker, victim = Browser(keyed.cluster), Browser(keyed.cluster)
    url, _ = await begin(attacker)
    back = await asyncio.to_thread(at_issuer, url, "ada")
    assert (await victim.fetch(back)).headers["location"] == "/?sign_in_failed=expired"
    await begin(victim)
    assert (await victim.fetch(back)).headers["location"] == "/?sign_in_failed=state"
    assert "headrace" not in victim.cookies


async def test_a_way_back_counts_once(keyed: Keyed) -> None:
    """The URL to which the issuer redirects the browser signs in only once. A second use of the URL is refused."""
    browser = Browser(keyed.cluster)
    url, _ = await begin(browser)
    cookies = dict(browser.cookies)
    back = await asyncio.to_thread(at_issuer, url, "ada")
    assert (await browser.fetch(back)).headers["location"] == "/"
    again = Browser(keyed.cluster)
    again.cookies = cookies
    assert (await again.fetch(back)).headers["location"] == "/?sign_in_failed=exchange"


@pytest.mark.parametrize(
    ("query", "status"),
    [("code=a&code=b", 400), ("&".join(f"a{n}=1" for n in range(80)), 400), ("code=" + "x" * 9000, 414)],
)
async def test_queries_are_bounded(keyed: Keyed, query: str, status: int) -> None:
    """A query with a repeated parameter, or with too many or too long parameters, is refused."""
    browser = Browser(keyed.cluster)
    await begin(browser)
    assert (await browser.fetch(f"{OIDC_CALLBACK}?{query}")).status == status


async def test_an_issuer_that_is_away(tmp_path: Path) -> None:
    """While the issuer cannot be reached, the page says so. Sign-in with a key still works."""
    async with cluster_at("http://localhost:9", tmp_path) as keyed:
        browser = Browser(keyed.cluster)
        reply = await browser.fetch(OIDC_START)
        assert (reply.status, reply.headers["location"]) == (303, "/?sign_in_failed=unavailable")
        assert (await browser.fetch("/console/session")).status == 200


async def test_without_an_issuer_there_is_no_path(tmp_path: Path) -> None:
    """If the configuration has no issuer, the HTTP paths of the OIDC sign-in do not exist."""
    async with keyed_cluster(tmp_path) as keyed:
        for path in (OIDC_START, OIDC_CALLBACK):
            assert (await Browser(keyed.cluster).fetch(path)).status == 404


def test_the_page_says_why() -> None:
    """The page has a text for exactly the reasons for which a sign-in can fail."""
    sources = [inspect.getsource(module) for module in (oidc_flow, oidc_sign_in)]
    reasons = {reason for source in sources for reason in re.findall(r'FlowError\("(\w+)"', source)}
    reasons |= {"suspended", "role", "tenant"}  # by the outcome of the tenant's check
    texts = re.findall(r"^  (\w+): ", (FOLDER / "sign_in_failures.js").read_text(), re.M)
    assert set(texts) == reasons
    assert len(texts) == len(reasons)


# ---- answers of an issuer

ISSUER = "http://localhost:1"
KEY = ec.generate_private_key(ec.SECP256R1())
STRANGER = ec.generate_private_key(ec.SECP256R1())


class Scripted(OidcFlow):
    """An OIDC sign-in flow with a simulated issuer, whose answers the test sets."""

    def __init__(self, secret: Path | None = None) -> None:
        settings = ConsoleOidc(issuer=ISSUER, client_id="con sole", client_secret_file=secret)
        self.token: Any = ""
        self.error: Exception | None = None
        self.forms: list[Mapping[str, str]] = []
        self.headers: list[Mapping[str, str]] = []
        self.methods = ["client_secret_basic"]
        super().__init__(settings, Issuer(ISSUER, "con sole", "org", "role"), PUBLIC, post=self.post, fetch=self.fetch)

    async def fetch(self, url: str) -> Mapping[str, Any]:
        """Return the discovery document or the keys."""
        if url.endswith("/keys"):
            return {"keys": [{**jwt.algorithms.ECAlgorithm.to_jwk(KEY.public_key(), as_dict=True), "kid": "k"}]}
        return {
            "issuer": ISSUER,
            "jwks_uri": f"{ISSUER}/keys",
            "authorization_endpoint": f"{ISSUER}/authorize?a=1",
            "token_endpoint": f"{ISSUER}/token",
            "token_endpoint_auth_methods_supported": self.methods,
        }

    async def post(self, url: str, form: Mapping[str, str], headers: Mapping[str, str]) -> Mapping[str, Any]:
        """Return the ID token that the test has set, or raise the error that it has set."""
        self.forms.append(dict(form))
        self.headers.append(dict(headers))
        if self.error is not None:
            raise self.error
        return {"id_token": self.token}

    def sign(self, flow: FlowState, key: Any = KEY, **claims: Any) -> str:
        """Return an ID token for a sign-in. `claims` replace the claims of a valid token. A claim that is a function is
        called with the current time and replaced by its result."""
        now_s = time.time()
        claims = {name: value(now_s) if callable(value) else value for name, value in claims.items()}
        body: dict[str, Any] = {
            "iss": ISSUER,
            "aud": "con sole",
            "sub": "ada",
            "org": "acme",
            "role": "viewer",
            "nonce": flow.nonce,
        }
        body |= {"exp": now_s + 300, "iat": now_s, **claims}
        kept = {name: value for name, value in body.items() if value is not None}
        return jwt.encode(kept, key, algorithm="ES256", headers={"kid": "k"})


def answer_of(flow: FlowState, **more: str) -> dict[str, str]:
    """Return the query of a valid redirect from the issuer back to the gateway. `more`: fields to add or replace."""
    return {"code": "c", "state": flow.state, **more}


async def reason(scripted: Scripted, flow: FlowState, answer: Mapping[str, str], later_s: float = 0.0) -> str:
    """Finish a sign-in that must fail, with a clock that is `later_s` seconds ahead. Return the reason of the
    failure."""
    with pytest.raises(FlowError) as caught:
        await scripted.finish(flow, answer, time.time() + later_s)
    return caught.value.reason


async def test_a_right_token() -> None:
    """A valid token yields its claims. The issuer gets the code verifier that matches the PKCE challenge."""
    scripted, flow = Scripted(), FlowState.begin(time.time())
    scripted.token = scripted.sign(flow)
    claims = await scripted.finish(flow, answer_of(flow, iss=ISSUER), time.time())
    assert (claims.tenant, claims.role, claims.subject) == ("acme", "viewer", "ada")
    (form,) = scripted.forms
    digest = hashlib.sha256(form["code_verifier"].encode()).digest()
    assert base64.urlsafe_b64encode(digest).decode().rstrip("=") == flow.challenge()
    assert (form["client_id"], form["redirect_uri"]) == ("con sole", f"{PUBLIC}{OIDC_CALLBACK}")
    assert (await scripted.authorization_url(flow)).startswith(f"{ISSUER}/authorize?a=1&response_type=code")


@pytest.mark.parametrize(
    ("claims", "expected"),
    [
        ({"nonce": None}, "nonce"),
        ({"nonce": "other"}, "nonce"),
        ({"nonce": 1}, "nonce"),
        ({"aud": "headrace"}, "token"),
        ({"aud": ["con sole", "other"]}, "token"),
        ({"aud": ["con sole", "other"], "azp": "other"}, "token"),
        ({"iss": "http://localhost:2"}, "token"),
        ({"exp": lambda now_s: now_s - 60}, "token"),
        ({"exp": None}, "token"),
        ({"iat": lambda now_s: now_s + 600}, "token"),
        ({"org": None}, "token"),
        ({"org": ["acme"]}, "token"),
        ({"sub": None}, "token"),
        ({"sub": "a\x1bb"}, "token"),
        ({"key": STRANGER}, "token"),
    ],
)
async def test_wrong_tokens(claims: dict[str, Any], expected: str) -> None:
    """An ID token of another sign-in, client or issuer, an expired token, and a token signed with another key are
    refused."""
    scripted, flow = Scripted(), FlowState.begin(time.time())
    scripted.token = scripted.sign(flow, **claims)
    assert await reason(scripted, flow, answer_of(flow)) == expected


@pytest.mark.parametrize("token", [None, 1, "", "x", "a.b.c", "eyJhbGciOiJub25lIn0.e30."])
async def test_no_tokens(token: Any) -> None:
    """An answer without an ID token, or with an ID token that is not a JWT, is refused."""
    scripted, flow = Scripted(), FlowState.begin(time.time())
    scripted.token = token
    assert await reason(scripted, flow, answer_of(flow)) in ("no_token", "token")


@pytest.mark.parametrize("error", [OSError("no route"), ValueError("no JSON"), TimeoutError()])
async def test_failing_exchanges(error: Exception) -> None:
    """The failure of a code exchange is reported with its own reason."""
    scripted, flow = Scripted(), FlowState.begin(time.time())
    scripted.error = error
    assert await reason(scripted, flow, answer_of(flow)) == "exchange"


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ({"state": "other"}, "state"),
        ({"state": ""}, "state"),
        ({"iss": "https://other.example"}, "issuer"),
        ({"error": "access_denied"}, "denied"),
        ({"code": ""}, "no_code"),
    ],
)
async def test_wrong_ways_back(answer: dict[str, str], expected: str) -> None:
    """If the redirect from the issuer has another state, another issuer, an error or no code, the sign-in fails, and no
    code is sent to the issuer's token endpoint."""
    scripted, flow = Scripted(), FlowState.begin(time.time())
    assert await reason(scripted, flow, answer_of(flow, **answer)) == expected
    assert not scripted.forms


async def test_a_sign_in_expires() -> None:
    """A sign-in that takes longer than ten minutes is refused."""
    scripted, flow = Scripted(), FlowState.begin(time.time())
    assert await reason(scripted, flow, answer_of(flow), FLOW_S) == "expired"


# ---- floods


class Slow(Scripted):
    """A simulated issuer that answers when the test lets it. Codes other than `good` are refused."""

    def __init__(self) -> None:
        super().__init__()
        self.answers = asyncio.Event()
        self.fetches = self.most = self.now = 0
        self._open = 0
        self._clock = lambda: self.now

    async def fetch(self, url: str) -> Mapping[str, Any]:
        """Fail to return the discovery document until the test lets the issuer answer."""
        if not url.endswith("/keys"):
            self.fetches += 1
            if not self.answers.is_set():
                await asyncio.sleep(0)
                raise OSError("no route")
        return await super().fetch(url)

    async def post(self, url: str, form: Mapping[str, str], headers: Mapping[str, str]) -> Mapping[str, Any]:
        """Wait, then refuse the code or return the token."""
        self._open += 1
        self.most = max(self.most, self._open)
        try:
            await self.answers.wait()
        finally:
            self._open -= 1
        if form["code"] != "good":
            raise ValueError("invalid_grant")
        return {"id_token": self.token}

    async def come_back(self, code: str, source: str) -> str:
        """Return how a sign-in from a source ends: the subject, or the reason of its failure."""
        flow = FlowState.begin(time.time())
        if code == "good":
            self.token = self.sign(flow)
        try:
            return (await self.finish(flow, answer_of(flow, code=code), time.time(), source)).subject
        except FlowError as error:
            return error.reason


async def test_a_failing_issuer_is_asked_once_for_all() -> None:
    """Beginnings that find the issuer away share one fetch, and further ones fail at once for some seconds."""
    scripted = Slow()

    async def begin() -> str:
        try:
            return await scripted.authorization_url(FlowState.begin(time.time()))
        except FlowError as error:
            return error.reason

    assert set(await asyncio.gather(*(begin() for _ in range(60)))) == {"unavailable"}
    scripted.answers.set()
    scripted.now = int(FAILURE_S) - 1
    assert (await begin(), scripted.fetches) == ("unavailable", 1)
    scripted.now = int(FAILURE_S)
    assert (await begin()).startswith(ISSUER)
    assert scripted.fetches == 2


@pytest.mark.parametrize("source", ["a", "c"])
async def test_junk_codes_keep_nobody_out(source: str) -> None:
    """While strangers of two addresses hold all exchanges and hundreds wait, a person waits, too, and is the next, even
    at the address of a stranger. Each address has bounded exchanges and bounded sign-ins that wait."""
    scripted = Slow()
    scripted._metadata = 0, await Scripted().fetch(ISSUER)
    junk = [asyncio.create_task(scripted.come_back("junk", stranger)) for _ in range(200) for stranger in "ab"]
    await asyncio.sleep(0)
    person = asyncio.create_task(scripted.come_back("good", source))
    await until(lambda: scripted.most > 0, "the issuer is asked")
    assert not person.done()
    scripted.answers.set()
    assert await person == "ada"
    assert scripted.most == MAX_EXCHANGES
    endings = Counter(task.result() for task in junk if task.done())
    assert endings["busy"] >= len(junk) - MAX_EXCHANGES - 2 * SOURCE_WAITING - 1
    assert endings["exchange"] <= 2 * MAX_EXCHANGES  # the second time together with the person
    for task in junk:
        task.cancel()
    await asyncio.gather(*junk, return_exceptions=True)
    assert [await scripted.come_back("good", each) for each in "ad"] == ["ada", "ada"]


async def test_a_gone_sign_in_leaves_its_slot() -> None:
    """A sign-in that is cancelled while it waits, or in its exchange, holds no slot."""
    slots = ExchangeSlots()

    async def hold() -> None:
        async with slots.slot("a"):
            await asyncio.Event().wait()

    for _ in range(3):
        tasks = [asyncio.create_task(hold()) for _ in range(3 * SOURCE_EXCHANGES)]
        await asyncio.sleep(0)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.sleep(0)
    await until(lambda: not slots._running and not slots._waiting, "nothing is left")


async def test_the_clients_secret(tmp_path: Path) -> None:
    """The client's secret is sent in the form that the issuer supports. The secret is read again for each sign-in."""
    file = tmp_path / "secret"
    file.write_text("first\n")
    scripted, flow = Scripted(file), FlowState.begin(time.time())
    scripted.token = scripted.sign(flow)
    await scripted.finish(flow, answer_of(flow), time.time())
    assert scripted.headers[0]["authorization"] == "Basic " + base64.b64encode(b"con+sole:first").decode()
    assert "client_secret" not in scripted.forms[0]
    file.write_text("second")
    posting = Scripted(file)
    posting.methods, posting.token = ["client_secret_post"], scripted.token
    await posting.finish(flow, answer_of(flow), time.time())
    assert (posting.forms[0]["client_secret"], posting.headers[0]) == ("second", {})


@pytest.mark.parametrize("content", [None, "", " \n"])
def test_an_unusable_secret_stops_the_start(tmp_path: Path, content: str | None) -> None:
    """If the file of the client's secret is missing or empty, the gateway does not start. The error names the
    setting."""
    file = tmp_path / "secret"
    if content is not None:
        file.write_text(content)
    with pytest.raises(ValueError, match=r"gateway\.console\.oidc\.client_secret_file"):
        Scripted(file)


@given(st.lists(st.text(max_size=5) | st.floats(allow_nan=False) | st.integers() | st.none(), max_size=5))
def test_states_of_another_form(value: list[Any]) -> None:
    """The state of a sign-in survives sealing and opening. A value of another form yields None."""
    flow = FlowState.begin(time.time())
    cookie = SealedCookie(lambda: [b"s" * 32], "console-oidc")
    assert FlowState.from_json(cookie.open(cookie.seal(flow.as_json()))) == flow
    is_state = [type(part) for part in value] == [str, str, str, float]
    assert (FlowState.from_json(value) is not None) == is_state
