"""Sign-in with an OpenID issuer: the authorization code flow (OpenID Connect Core 1.0) with PKCE (RFC 7636).

The browser holds the state of a sign-in in a sealed cookie, so any gateway can finish the sign-in. `state` and the
cookie bind the answer to this browser, and `nonce` and PKCE bind the ID token and the code to this sign-in. The ID
token is verified like any other token of the issuer (auth/oidc.py), with the console's client id as its audience.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import json
import secrets as randomness
import time
import urllib.parse
import urllib.request
from collections import Counter, deque
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import astuple, dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Any, Final

import jwt
import structlog

from cluster.api.outcomes import CallError
from cluster.config.console import ConsoleOidc
from cluster.gateway.auth.bearer_tokens import TokenRefused
from cluster.gateway.auth.no_redirect import open_no_redirect
from cluster.gateway.auth.oidc import Fetch, Issuer, OidcVerifier, TokenClaims, check_url, fetch_json
from cluster.gateway.console.access.sign_in import OIDC_CALLBACK

log = structlog.get_logger("console")

FLOW_S: Final = 600.0
"""Seconds that a person has to sign in at the issuer."""
TIMEOUT_S: Final = 5.0
METADATA_S: Final = 300.0
"""Seconds for which the issuer's addresses are used before they are fetched again."""
MAX_ANSWER_BYTES: Final = 256 * 1024
FAILURE_S: Final = 5.0
"""Seconds for which a failed fetch of the issuer's addresses fails all sign-ins, instead of another fetch for each."""
MAX_EXCHANGES: Final = 16
"""Maximum number of codes that are exchanged at the same time; further sign-ins wait."""
SOURCE_EXCHANGES: Final = 8
"""Maximum number of codes from one source that are exchanged at the same time."""
SOURCE_WAITING: Final = 64
"""Maximum number of sign-ins of one source that wait. With a further one, the oldest fails as `busy`."""
FAILED_EXCHANGE_S: Final = 1.0
"""Seconds for which a failed exchange goes on to count, which bounds the requests to the issuer."""

Post = Callable[[str, Mapping[str, str], Mapping[str, str]], Awaitable[Mapping[str, Any]]]
"""Function that sends a form (address, fields, headers) and returns the JSON object of the answer. Raises OSError,
ValueError or HTTPException."""


class FlowError(Exception):
    """Error of a sign-in. `reason`: a short code such as `expired`, for the page and the log."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(detail or reason)
        self.reason = reason


@dataclass(frozen=True, slots=True)
class FlowState:
    """State of one sign-in between the redirect to the issuer and the redirect back."""

    state: str
    nonce: str
    verifier: str
    """The code verifier of PKCE. The issuer gets its SHA-256 first, and the verifier itself with the code."""
    expires_at_s: float

    @classmethod
    def begin(cls, now_s: float) -> FlowState:
        """Return the state of a new sign-in, with random values."""
        state, nonce, verifier = (randomness.token_urlsafe(32) for _ in range(3))
        return cls(state, nonce, verifier, now_s + FLOW_S)

    @classmethod
    def from_json(cls, value: Any) -> FlowState | None:
        """Return the state of a sign-in from the value of a cookie; None if the value is not valid."""
        kinds = [str, str, str, float]
        if not isinstance(value, list) or [type(part) for part in value] != kinds:
            return None
        return cls(*value)

    def as_json(self) -> list[Any]:
        """Return the state as the value of a cookie; `from_json` is the inverse."""
        return list(astuple(self))

    def challenge(self) -> str:
        """Return the PKCE challenge of the method S256."""
        digest = hashlib.sha256(self.verifier.encode()).digest()
        return base64.urlsafe_b64encode(digest).decode().rstrip("=")


class ExchangeSlots:
    """The slots for code exchanges with the issuer. Nobody can tell a stranger's code from a person's. So the next free
    slot goes to the source with the fewest exchanges, and within it to the newest sign-in: it waits for one exchange,
    not for all of a burst before it."""

    def __init__(self) -> None:
        self._running: Counter[str] = Counter()
        self._waiting: dict[str, deque[asyncio.Future[None]]] = {}

    @asynccontextmanager
    async def slot(self, source: str) -> AsyncIterator[None]:
        """Wait for a slot and hold it. Raises FlowError."""
        if self._has_slot(source):
            self._running[source] += 1
        else:
            await self._wait(source)
        held_s = 0.0
        try:
            yield
        except FlowError:
            held_s = FAILED_EXCHANGE_S
            raise
        finally:
            asyncio.get_running_loop().call_later(held_s, self._release, source)

    def _has_slot(self, source: str) -> bool:
        return self._running.total() < MAX_EXCHANGES and self._running[source] < SOURCE_EXCHANGES

    async def _wait(self, source: str) -> None:
        waiter = asyncio.get_running_loop().create_future()
        waiting = self._waiting.setdefault(source, deque())
        waiting.append(waiter)
        if len(waiting) > SOURCE_WAITING and not (oldest := waiting.popleft()).done():
            oldest.set_exception(FlowError("busy"))
        try:
            await waiter
        except asyncio.CancelledError:
            if not waiter.cancelled():
                self._release(source)
            elif waiter in waiting:
                waiting.remove(waiter)
            raise

    def _release(self, source: str) -> None:
        self._running[source] -= 1
        self._running += Counter()  # forgets sources without exchanges
        while sources := [source for source in self._waiting if self._has_slot(source)]:
            source = min(sources, key=self._running.__getitem__)
            waiting = self._waiting[source]
            if waiting and not (waiter := waiting.pop()).done():
                self._running[source] += 1
                waiter.set_result(None)
            if not waiting:
                del self._waiting[source]


class OidcFlow:
    """The authorization code flow with one issuer."""

    def __init__(
        self,
        settings: ConsoleOidc,
        issuer: Issuer,
        public_url: str,
        *,
        post: Post | None = None,
        fetch: Fetch = fetch_json,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Prepare the sign-in. `issuer`: the OIDC provider; its `audience` must be the console's client id.
        `public_url`: the console's address. `post`, `fetch` and `clock` are replaced in tests. Raises ValueError if the
        file of the client secret cannot be read."""
        self._settings = settings
        self._redirect_uri = public_url + OIDC_CALLBACK
        self._verifier = OidcVerifier([issuer], fetch=fetch)
        self._fetch = fetch
        self._post = post or self._post_form
        self._threads = ThreadPoolExecutor(MAX_EXCHANGES, thread_name_prefix="oidc")
        """Threads of their own: while the issuer is slow, exchanges must not hold those of other work."""
        self._clock = clock
        self._metadata: tuple[float, Mapping[str, Any]] | None = None
        self._failure: tuple[float, FlowError] | None = None
        """The last failed fetch, and the time until which it counts."""
        self._fetching = asyncio.Lock()
        self._slots = ExchangeSlots()
        if settings.client_secret_file is not None:
            _secret_in(settings.client_secret_file)

    async def authorization_url(self, flow: FlowState) -> str:
        """Return the address of the issuer's sign-in page. Raises FlowError."""
        endpoint = self._endpoint(await self._known_metadata(), "authorization_endpoint")
        query = {
            "response_type": "code",
            "client_id": self._settings.client_id,
            "redirect_uri": self._redirect_uri,
            "scope": " ".join(self._settings.scopes),
            "state": flow.state,
            "nonce": flow.nonce,
            "code_challenge": flow.challenge(),
            "code_challenge_method": "S256",
        }
        separator = "&" if urllib.parse.urlsplit(endpoint).query else "?"
        return f"{endpoint}{separator}{urllib.parse.urlencode(query)}"

    async def finish(self, flow: FlowState, answer: Mapping[str, str], now_s: float, source: str = "") -> TokenClaims:
        """Exchange the code in the issuer's answer for an ID token, and return the token's claims. `answer`: the query
        parameters with which the issuer has redirected the browser back. `source`: where the browser is, see
        ExchangeSlots. Raises FlowError."""
        if now_s >= flow.expires_at_s:
            raise FlowError("expired")
        if not hmac.compare_digest(answer.get("state", "").encode(), flow.state.encode()):
            raise FlowError("state")
        if "iss" in answer and answer["iss"] != self._settings.issuer:  # RFC 9207, against mix-up of issuers
            raise FlowError("issuer")
        if "error" in answer:
            raise FlowError("denied", answer["error"])
        if not answer.get("code"):
            raise FlowError("no_code")
        async with self._slots.slot(source):
            token = await self._id_token(flow, answer["code"])
            return await self._claims(flow, token)

    async def close(self) -> None:
        """Cancel all running fetches."""
        await self._verifier.close()
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def _id_token(self, flow: FlowState, code: str) -> str:
        metadata = await self._known_metadata()
        form = {
            "grant_type": "authorization_code",
            "code": code,
            "redirect_uri": self._redirect_uri,
            "code_verifier": flow.verifier,
        }
        headers: dict[str, str] = {}
        file = self._settings.client_secret_file
        if file is None:
            form["client_id"] = self._settings.client_id
        else:
            secret = await asyncio.to_thread(_secret_in, file)  # read again: the file may have been replaced
            self._present_secret(metadata, secret, form, headers)
        try:
            async with asyncio.timeout(2 * TIMEOUT_S):
                answer = await self._post(self._endpoint(metadata, "token_endpoint"), form, headers)
        except (OSError, ValueError, HTTPException, TimeoutError) as error:
            raise FlowError("exchange", str(error)) from None
        token = answer.get("id_token")
        if not isinstance(token, str):
            raise FlowError("no_token")
        return token

    def _present_secret(
        self, metadata: Mapping[str, Any], secret: str, form: dict[str, str], headers: dict[str, str]
    ) -> None:
        """Add the client's secret to a request, in the way that the issuer supports (RFC 6749, section 2.3.1)."""
        methods = metadata.get("token_endpoint_auth_methods_supported", ["client_secret_basic"])
        client_id = self._settings.client_id
        if "client_secret_basic" not in methods and "client_secret_post" in methods:
            form |= {"client_id": client_id, "client_secret": secret}
            return
        quoted = f"{urllib.parse.quote_plus(client_id)}:{urllib.parse.quote_plus(secret)}"
        headers["authorization"] = f"Basic {base64.b64encode(quoted.encode()).decode()}"

    async def _claims(self, flow: FlowState, token: str) -> TokenClaims:
        try:
            claims = await self._verifier.verify(token)
            # The signature was just verified; `verify` returns no nonce.
            body = jwt.decode(token, options={"verify_signature": False, "verify_exp": False, "verify_aud": False})
        except TokenRefused as refused:
            raise FlowError("token", refused.reason) from None
        except CallError as error:
            raise FlowError("unavailable", error.message) from None
        nonce = body.get("nonce")
        if not isinstance(nonce, str) or not hmac.compare_digest(nonce.encode(), flow.nonce.encode()):
            raise FlowError("nonce")
        if isinstance(body.get("aud"), list) and len(body["aud"]) > 1 and body.get("azp") != self._settings.client_id:
            raise FlowError("token", "azp")
        if not claims.subject:
            raise FlowError("token", "no_subject")
        return claims

    async def _known_metadata(self) -> Mapping[str, Any]:
        """Return the issuer's discovery document, which is fetched again after METADATA_S. Raises FlowError."""
        async with self._fetching:
            now = self._clock()
            if self._metadata is not None and now < self._metadata[0] + METADATA_S:
                return self._metadata[1]
            if self._failure is not None and now < self._failure[0]:
                raise FlowError(self._failure[1].reason, str(self._failure[1]))
            try:
                metadata = await self._fetched_metadata()
            except FlowError as error:
                self._failure = self._clock() + FAILURE_S, error
                raise
            self._metadata = now, metadata
            return metadata

    async def _fetched_metadata(self) -> Mapping[str, Any]:
        url = self._settings.issuer.rstrip("/") + "/.well-known/openid-configuration"
        try:
            async with asyncio.timeout(2 * TIMEOUT_S):
                metadata = await self._fetch(url)
        except (OSError, ValueError, HTTPException, TimeoutError) as error:
            raise FlowError("unavailable", str(error)) from None
        if metadata.get("issuer") != self._settings.issuer:
            raise FlowError("unavailable", "the discovery document names another issuer")
        return metadata

    async def _post_form(self, url: str, form: Mapping[str, str], headers: Mapping[str, str]) -> Mapping[str, Any]:
        return await asyncio.get_running_loop().run_in_executor(self._threads, _send_form, url, form, headers)

    @staticmethod
    def _endpoint(metadata: Mapping[str, Any], name: str) -> str:
        try:
            return check_url(str(metadata.get(name, "")))
        except ValueError as error:
            raise FlowError("unavailable", f"{name}: {error}") from None


def _secret_in(file: Path) -> str:
    """Return the client secret in a file. Raises ValueError if there is none; the error never contains the secret."""
    setting = "gateway.console.oidc.client_secret_file"
    try:
        secret = file.read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{setting}: {file} cannot be read: {error}") from None
    if not secret:
        raise ValueError(f"{setting}: {file} is empty; write the client secret into it, or remove the setting")
    return secret


def _send_form(url: str, form: Mapping[str, str], headers: Mapping[str, str]) -> Mapping[str, Any]:
    request = urllib.request.Request(  # noqa: S310 - checked by check_url
        url, urllib.parse.urlencode(form).encode(), {"accept": "application/json", **headers}
    )
    with open_no_redirect(request, TIMEOUT_S) as answer:
        data = answer.read(MAX_ANSWER_BYTES + 1)
    if len(data) > MAX_ANSWER_BYTES:
        raise ValueError(f"the issuer sends more than {MAX_ANSWER_BYTES} bytes")
    value = json.loads(data)
    if not isinstance(value, Mapping):
        raise ValueError("the issuer sends no JSON object")
    return value
