"""The door of a gateway with `auth`: the ledger's snapshot, keys, tokens, certificates, and what failures tell.

The database is off the calls' path: it is asked from a thread, and while it is away the last snapshot serves
(ledger/tenants/watch.py). A change reaches the calls within a pass of the watcher: running calls of a tenant that may
no longer call are ended, and everybody who stays is asked again.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import structlog

from cluster.api.outcomes import CallError, Outcome
from cluster.config.schema import Config, cache_dir, database_url, secret_files
from cluster.config.tenants import Auth
from cluster.gateway.auth.authenticator import Caller, Credentials
from cluster.gateway.auth.credentials import CredentialChecker
from cluster.gateway.quotas.budgets import BudgetWatch, Spent
from cluster.gateway.usage.prompt_log import PromptLog
from cluster.ledger.audit.audit import AuditEvent, AuditLog
from cluster.ledger.audit.writer import AuditWriter
from cluster.ledger.database.bring_up import bring_up, bring_up_elsewhere
from cluster.ledger.errors import LedgerError
from cluster.ledger.files import read_secrets
from cluster.ledger.store import Ledger
from cluster.ledger.tenants.watch import Watcher
from cluster.observe.metrics import Metrics
from cluster.policy.tenants.identity import (
    BAD_KEY,
    SUSPENDED,
    AccessSnapshot,
    CertificateRule,
    Principal,
    cache_salt,
    tenant_handle,
)
from cluster.policy.tenants.policy import TenantPolicy
from cluster.process import memory
from cluster.process.background import put_behind, put_last
from cluster.process.private_files import make_private_folder

if TYPE_CHECKING:
    from cluster.gateway.auth.oidc import OidcVerifier
    from cluster.gateway.guards.guards import GuardDecision

log = structlog.get_logger("tenants")

FIRST_ANSWER_S = 5.0
"""How long a start waits for the database, where no snapshot of an earlier life serves meanwhile."""
CHECK_AFTER_S = 2.0
"""A database that has answered is checked when the first calls are through, in a process of its own."""
SOON_S = 30.0
"""A check that runs where nothing else wants to, and has not ended by then, is begun again with a right to a core."""
AGAIN_S, MOST_AGAIN_S = 5.0, 60.0
ASK_AGAIN_S = 30.0
"""Sessions are asked again this often without any change, since keys and tokens expire by themselves."""
FIRST_EXPIRY_S, EXPIRY_S = 600.0, 86400.0


class TenantAuthenticator:
    """Implements Door. Only process 0 of a host prepares the database and removes what is too old."""

    def __init__(self, config: Config, folder: Path, metrics: Metrics, process: int = 0) -> None:
        """`folder` keeps the snapshot and the audit log of this process. Raises ValueError for a secret's file."""
        assert config.auth is not None
        files = secret_files(config)
        found = {setting: read_secrets(path, setting) for setting, path in files.items()}
        self.secrets = found["auth.cluster_secret_file"]
        """The cluster's secrets: the first signs, all verify."""
        self.by_certificate = bool(config.auth.client_certificates)
        self.on_change: set[Callable[[], None]] = set()
        self._config = config
        self._first = process == 0
        self._metrics = metrics
        self._policies = config.policies()
        if not config.store.database_url:
            make_private_folder(cache_dir())
        peppers = found.get("auth.api_keys.pepper_file", ())
        self.ledger = Ledger(database_url(config), peppers=peppers)
        self.audit = AuditWriter(AuditLog(folder / "audit.jsonl"), self.ledger.audit.insert)
        self._watcher = Watcher(
            self.ledger.snapshots.read,
            folder / "snapshot.json",
            stale_after_s=config.store.stale_after_s,
            declared=self._policies,
            on_change=self._changed,
        )
        self.prompts = PromptLog(
            folder / "prompts", self._everybody, config.store.retention_days.prompts, self._metrics
        )
        self._oidc = _verifier(config.auth)
        self._authenticator = CredentialChecker(
            self._watcher.current,
            peppers=peppers,
            oidc=self._oidc,
            certificates=[CertificateRule(one.san, one.tenant, one.role) for one in config.auth.client_certificates],
            told=self._told,
        )
        self._dressed: dict[str, tuple[TenantPolicy, TenantPolicy, str]] = {}
        self._visitors: set[Caller] = set()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._news = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []

    # ---- life

    async def start(self) -> None:
        """Know who may call, or say in the log why not yet."""
        self._loop = asyncio.get_running_loop()
        tried = asyncio.Event()
        waits = self._watcher.statistics().age_s == float("inf")
        if waits and self._is_there():  # most likely it is as we need it: who may call is known before that is checked
            waits = not await asyncio.to_thread(self._watcher.ask)
        self._tasks = [
            asyncio.create_task(self._prepare(tried, serving=not waits)),
            asyncio.create_task(self._ask_again()),
        ]
        if waits:
            with suppress(TimeoutError):
                async with asyncio.timeout(FIRST_ANSWER_S):
                    await tried.wait()
                    await asyncio.to_thread(self._watcher.ask)
        self._watcher.start()
        self.prompts.start()

    async def stop(self) -> None:
        """End the threads; what is to be audited is written."""
        self._loop = None
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._oidc is not None:
            await self._oidc.close()
        await asyncio.to_thread(self._watcher.stop)
        await asyncio.to_thread(self.audit.close)
        await asyncio.to_thread(self.prompts.close)
        self.ledger.close()

    def budgets(self, spent: Spent) -> BudgetWatch:
        """What follows every tenant's budget. Raises ValueError for the webhook's secret."""
        observe = self._config.observe
        webhook = observe.budget_webhook if self._first else None
        setting = "observe.budget_webhook.secret_file"
        return BudgetWatch(
            self._config.name,
            self.ledger,
            lambda: list(self._everybody().values()),
            self._metrics,
            spent,
            webhook=webhook,
            secret=b"" if webhook is None else read_secrets(webhook.secret_file, setting)[0],
            max_tenants=observe.max_tenant_series,
        )

    async def _prepare(self, tried: asyncio.Event, *, serving: bool) -> None:
        """Process 0 brings the database up to the file; then, daily, what is too old goes. `serving`: calls come
        already, and are not to wait for that."""
        url, again_s = database_url(self._config), AGAIN_S
        await asyncio.sleep(CHECK_AFTER_S if serving else 0.0)
        while self._first:
            try:
                if serving:
                    if again_s == AGAIN_S:
                        await bring_up_elsewhere(url, put_last, SOON_S)
                    else:  # on a busy machine that may have had no core
                        await bring_up_elsewhere(url, put_behind)
                else:
                    await asyncio.to_thread(bring_up, url)
                    memory.settle()  # that has imported what migrates
                await asyncio.to_thread(self.ledger.tenants.declare, self._policies)
                break
            except LedgerError as error:
                log.warning("ledger_not_ready", error=str(error))
                tried.set()
                await asyncio.sleep(again_s)
                again_s = min(2 * again_s, MOST_AGAIN_S) if serving else AGAIN_S  # a process each time
        tried.set()
        wait_s = FIRST_EXPIRY_S
        while self._first:
            await asyncio.sleep(wait_s)
            wait_s = EXPIRY_S
            from cluster.ledger.database.retention import expire

            days = self._config.store.retention_days
            try:
                gone = await asyncio.to_thread(
                    expire, self.ledger, time.time(), usage_days=days.usage, audit_days=days.audit
                )
                log.info("ledger_expired", usage=gone.usage, audit=gone.audit)
            except LedgerError as error:
                log.warning("ledger_not_expired", error=str(error))

    def _is_there(self) -> bool:
        """Whether the database can have been prepared before: a file of SQLite's that is not there has not."""
        url = database_url(self._config)
        return not url.startswith("sqlite:///") or Path(url.removeprefix("sqlite:///")).exists()

    # ---- Door

    async def principal(self, shown: Credentials) -> Principal:
        """See Door."""
        found = await self._authenticator.principal(shown.authorization, shown.names, shown.peer)
        tenant = self._dress(found.tenant)[1]
        return Principal(tenant, found.role, found.by, found.subject, found.model_aliases)

    def knows(self) -> AccessSnapshot:
        """See Door."""
        return self.snapshot()

    async def visit(self, shown: Credentials) -> Caller:
        """See Door."""
        visitor = Caller(await self.principal(shown), shown)
        self._visitors.add(visitor)
        return visitor

    def leave(self, visitor: Caller) -> None:
        """See Door."""
        self._visitors.discard(visitor)

    def snapshot(self) -> AccessSnapshot:
        """Everybody known now. Raises CallError STORE_UNAVAILABLE."""
        return self._watcher.current()

    def _everybody(self) -> dict[str, TenantPolicy]:
        return {name: entry.policy for name, entry in self.snapshot().tenants.items()}

    def standing(self, tenant: str) -> CallError | None:
        """See Door. While the database is away too long new calls are refused, but those that run go on."""
        try:
            entry = self._watcher.current().tenants.get(tenant)
        except CallError:
            return None
        if entry is None:
            return CallError(Outcome.UNAUTHENTICATED_KEY, BAD_KEY)
        return CallError(Outcome.TENANT_SUSPENDED, SUSPENDED) if entry.policy.suspended else None

    def salt(self, principal: Principal, own: str) -> str:
        """See Door."""
        policy = principal.tenant
        return cache_salt(self.secrets, policy, own) if own else self._dress(policy)[2]

    def _dress(self, policy: TenantPolicy) -> tuple[TenantPolicy, TenantPolicy, str]:
        """The policy as the snapshot has it, the same with its handle, and its salt; made once for each policy."""
        known = self._dressed.get(policy.name)
        if known is None or (policy is not known[0] and policy is not known[1]):
            handle = tenant_handle(self.secrets, policy.name)
            known = (policy, replace(policy, handle=handle), cache_salt(self.secrets, policy))
            self._dressed[policy.name] = known
        return known

    def decided(self, one: GuardDecision) -> None:
        """What a guard has decided goes into the audit log."""
        details: dict[str, Any] = {
            "guard": one.guard,
            "model": one.model,
            "request_id": one.request_id,
            "found": one.found,
        }
        if one.texts:
            details["texts"] = list(one.texts)
        event = AuditEvent(
            time.time(),
            "policy",
            "guard",
            actor=one.actor,
            tenant=one.tenant,
            object=f"tenants/{one.tenant}",
            outcome=one.outcome,
            details=details,
        )
        self.audit.write(event)

    # ---- news

    def _changed(self, snapshot: AccessSnapshot) -> None:
        """In the watcher's thread."""
        loop = self._loop
        if loop is not None:
            with suppress(RuntimeError):  # the loop has ended this moment
                loop.call_soon_threadsafe(self._tell_change)

    def _tell_change(self) -> None:
        self._news.set()
        for told in list(self.on_change):
            told()

    async def _ask_again(self) -> None:
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(ASK_AGAIN_S):
                    await self._news.wait()
            self._news.clear()
            for number, visitor in enumerate(list(self._visitors)):
                try:
                    visitor.principal = await self.principal(visitor.shown)
                    visitor.refused = None
                except CallError as error:
                    visitor.refused = error
                if number % 100 == 99:
                    await asyncio.sleep(0)  # thousands of sessions must not hold the loop

    def _told(self, reason: str, subject: str, peer: str) -> None:
        self._metrics.count("auth_failures_total", reason)
        event = AuditEvent(
            time.time(), "auth_failure", "authenticate", actor=subject, outcome=reason, source=peer
        )  # of a wrong key nothing but the id that it claims
        self.audit.write(event)


def _verifier(auth: Auth) -> OidcVerifier | None:
    if not auth.oidc:
        return None
    from cluster.gateway.auth.oidc import Issuer, OidcVerifier

    issuers = [
        Issuer(one.issuer, one.audience, one.tenant_claim, one.role_claim, frozenset(one.algorithms))
        for one in auth.oidc
    ]
    return OidcVerifier(issuers)
