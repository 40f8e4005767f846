"""The authenticator of a gateway whose configuration has a section `auth`. It checks API keys, JWTs and
certificates against a snapshot of the ledger (the database of tenants and keys).

Calls never wait for the database. A thread reads the database into the snapshot
(ledger/tenants/watch.py). While the database is unreachable, the last snapshot is used.

When the thread finds a change, running calls of a suspended or deleted tenant end, and callers with
long-lived connections are authenticated again. Failed authentications are recorded in the audit log and
the metrics.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.api.outcomes import CallError, Outcome
from cluster.config.paths import cache_dir, database_url, secret_files
from cluster.config.schema import Config
from cluster.config.tenants import Auth
from cluster.gateway.auth.authenticator import Caller, Credentials, RegisteredCallers
from cluster.gateway.auth.credentials import CredentialChecker
from cluster.gateway.auth.derived_tenants import DerivedTenants
from cluster.gateway.auth.ledger_upkeep import LedgerUpkeep
from cluster.gateway.usage.prompt_log import PromptLog
from cluster.ledger.audit.audit import AuditEvent, AuditLog
from cluster.ledger.audit.writer import AuditWriter
from cluster.ledger.files import read_secrets
from cluster.ledger.store import Ledger
from cluster.ledger.tenants.watch import Watcher, WatchStatistics
from cluster.observe.metrics import Metrics
from cluster.policy.tenants.identity import (
    BAD_KEY,
    SUSPENDED,
    AccessSnapshot,
    CertificateRule,
    Principal,
)
from cluster.policy.tenants.policy import TenantPolicy
from cluster.process.private_files import make_private_folder

if TYPE_CHECKING:
    from cluster.gateway.auth.oidc import OidcVerifier
    from cluster.gateway.guards.decisions import GuardDecision

FIRST_ANSWER_S = 5.0
"""Seconds that `start` waits for the database if there is no snapshot from an earlier run."""
CHECK_AFTER_S = 2.0
"""Seconds between the database's first answer and the check of its schema. The check runs in a separate process. The
delay keeps the check from slowing the first calls."""


class TenantAuthenticator:
    """Authenticator for a configuration with a section `auth`, and the owner of the gateway's ledger, audit log and
    prompt log. Only process 0 of a host prepares the database and removes expired rows."""

    def __init__(self, config: Config, folder: Path, metrics: Metrics, process: int = 0) -> None:
        """`folder`: the folder for this process's snapshot, audit log and prompt log. Raises ValueError for an unusable
        secret file."""
        assert config.auth is not None
        files = secret_files(config)
        secrets = {setting: read_secrets(path, setting) for setting, path in files.items()}
        self.secrets = secrets["auth.cluster_secret_file"]
        """The cluster's secrets. The first secret signs; every secret verifies."""
        self.by_certificate = bool(config.auth.client_certificates)
        self.on_change: set[Callable[[], None]] = set()
        self._first = process == 0
        self._metrics = metrics
        declared = config.policies()
        if not config.store.database_url:
            make_private_folder(cache_dir())
        peppers = self.peppers = secrets.get("auth.api_keys.pepper_file", ())
        self.ledger = Ledger(database_url(config), peppers=peppers)
        self.audit = AuditWriter(AuditLog(folder / "audit.jsonl"), self.ledger.audit.insert)
        self._watcher = Watcher(
            self.ledger.snapshots.read,
            folder / "snapshot.json",
            stale_after_s=config.store.stale_after_s,
            declared=declared,
            on_change=self._changed,
        )
        self.prompts = PromptLog(folder / "prompts", self.policies, config.store.retention_days.prompts, self._metrics)
        self._oidc = _verifier(config.auth)
        self._authenticator = CredentialChecker(
            self._watcher.current,
            peppers=peppers,
            oidc=self._oidc,
            certificates=[
                CertificateRule(rule.san, rule.tenant, rule.role) for rule in config.auth.client_certificates
            ],
            on_failure=self._record_failure,
        )
        self.derived = DerivedTenants(self.secrets)
        """The handles and cache salts of the tenants."""
        self._callers = RegisteredCallers(self.principal)
        self._upkeep = LedgerUpkeep(config, self.ledger, declared)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._tasks: list[asyncio.Task[None]] = []

    # ---- start and stop

    async def start(self) -> None:
        """Start the background work. If there is no snapshot of tenants and keys from an earlier run, wait up to
        FIRST_ANSWER_S for the first snapshot."""
        self._loop = asyncio.get_running_loop()
        tried = asyncio.Event()
        waits = self._watcher.statistics().age_s == float("inf")
        if waits and self._upkeep.may_be_prepared:
            # The schema is most likely current, so the snapshot is read before the check.
            waits = not await asyncio.to_thread(self._watcher.poll)
        self._tasks = [
            asyncio.create_task(self._keep_ledger(tried, serving=not waits)),
            asyncio.create_task(self._callers.reauthenticate()),
        ]
        if waits:
            with suppress(TimeoutError):
                async with asyncio.timeout(FIRST_ANSWER_S):
                    await tried.wait()
                    await asyncio.to_thread(self._watcher.poll)
        self._watcher.start()
        self.prompts.start()

    def database_polls(self) -> WatchStatistics:
        """Return the state of the polls for tenants and keys."""
        return self._watcher.statistics()

    async def stop(self) -> None:
        """Write the pending audit events and prompts, then stop the threads."""
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

    async def _keep_ledger(self, tried: asyncio.Event, *, serving: bool) -> None:
        """In process 0, prepare the ledger's database and then delete expired rows regularly. `tried`: the event that
        is set after the first attempt. `serving`: whether calls already run; if so, the work is delayed and has low
        priority."""
        await asyncio.sleep(CHECK_AFTER_S if serving else 0.0)
        if self._first:
            await self._upkeep.prepare(tried, serving=serving)
        tried.set()
        if self._first:
            await self._upkeep.expire()

    # ---- Authenticator

    async def principal(self, credentials: Credentials) -> Principal:
        """Implements `Authenticator.principal`."""
        return self.derived.with_handle(
            await self._authenticator.principal(credentials.authorization, credentials.names, credentials.peer)
        )

    def knows(self) -> AccessSnapshot:
        """Implements `Authenticator.knows`."""
        return self.snapshot()

    async def register(self, credentials: Credentials) -> Caller:
        """Implements `Authenticator.register`."""
        return await self._callers.register(credentials)

    def unregister(self, caller: Caller) -> None:
        """Implements `Authenticator.unregister`."""
        self._callers.unregister(caller)

    def snapshot(self) -> AccessSnapshot:
        """Return the current snapshot of tenants and keys. Raises CallError STORE_UNAVAILABLE."""
        return self._watcher.current()

    def policies(self) -> dict[str, TenantPolicy]:
        """Return the current policy of each tenant, keyed by name. Raises CallError STORE_UNAVAILABLE."""
        return {name: entry.policy for name, entry in self.snapshot().tenants.items()}

    def tenant_error(self, tenant: str) -> CallError | None:
        """Implements `Authenticator.tenant_error`. While the snapshot is too old, new calls are refused but running
        calls continue."""
        try:
            entry = self._watcher.current().tenants.get(tenant)
        except CallError:
            return None
        if entry is None:
            return CallError(Outcome.UNAUTHENTICATED_KEY, BAD_KEY)
        return CallError(Outcome.TENANT_SUSPENDED, SUSPENDED) if entry.policy.suspended else None

    def cache_salt(self, principal: Principal, own: str) -> str:
        """Implements `Authenticator.cache_salt`."""
        return self.derived.cache_salt(principal.tenant, own)

    # ---- changes and failures

    def refresh(self) -> None:
        """Read the tenants and keys from the database soon, since they have changed. Thread-safe; returns at once."""
        self._watcher.poll_soon()

    def _changed(self, snapshot: AccessSnapshot) -> None:
        """Derive the handles of all tenants, and schedule the `on_change` functions on the event loop. The watcher's
        thread calls this method."""
        self.derived.set_tenants(entry.policy for entry in snapshot.tenants.values())
        loop = self._loop
        if loop is not None:
            with suppress(RuntimeError):  # the loop has just been closed
                loop.call_soon_threadsafe(self._notify_change)

    def _notify_change(self) -> None:
        self._callers.mark_changed()
        for callback in list(self.on_change):
            callback()

    def _record_failure(self, reason: str, subject: str, peer: str) -> None:
        self._metrics.count("auth_failures_total", reason)
        event = AuditEvent(
            time.time(), "auth_failure", "authenticate", actor=subject, outcome=reason, source=peer
        )  # of a wrong key, only the claimed key id is recorded
        self.audit.write(event)


def guard_event(decision: GuardDecision) -> AuditEvent:
    """Return the audit event of a guard's decision."""
    details: dict[str, Any] = {
        "guard": decision.guard,
        "model": decision.model,
        "request_id": decision.request_id,
        "found": decision.matches,
    }
    if decision.texts:
        details["texts"] = list(decision.texts)
    return AuditEvent(
        time.time(),
        "policy",
        "guard",
        actor=decision.actor,
        tenant=decision.tenant,
        object=f"tenants/{decision.tenant}",
        outcome=decision.outcome,
        details=details,
    )


def _verifier(auth: Auth) -> OidcVerifier | None:
    if not auth.oidc:
        return None
    from cluster.gateway.auth.oidc import Issuer, OidcVerifier

    issuers = [
        Issuer(issuer.issuer, issuer.audience, issuer.tenant_claim, issuer.role_claim, frozenset(issuer.algorithms))
        for issuer in auth.oidc
    ]
    return OidcVerifier(issuers)
