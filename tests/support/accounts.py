"""Gateways with usage accounting, and workers that record every accepted request."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

from cluster.api.ports import Engine
from cluster.api.types import WorkerIdentity
from cluster.config.document import parse
from cluster.gateway.optional_parts import UsageStore
from cluster.gateway.server import Gateway
from cluster.ledger.errors import StoreUnavailable
from cluster.ledger.rows import UsageQuery
from cluster.ledger.store import Ledger
from cluster.ledger.usage.records import OpenRecord, UsageRecord
from cluster.ledger.usage.sealed_records import Sealer
from cluster.wire.bundle import Bundle
from cluster.wire.dial import Timing
from cluster.wire.ended_requests import EndedUsage, UsageKeeper
from cluster.worker.session import WorkerSession
from tests.support.cluster import LOOPBACK, PATIENT, TestCluster

SECRET = b"s" * 32
_numbers = itertools.count(1)


class Witness(UsageKeeper):
    """Usage keeper that also records the usage of every request that the worker has accepted."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[EndedUsage] = []
        self.told_at = 0.0

    def keep(self, usage: EndedUsage, home: int, slot: int = 0) -> int:
        self.seen.append(usage)
        self.told_at = time.monotonic()
        return super().keep(usage, home, slot)

    def accepted(self, sealer: Sealer) -> list[tuple[OpenRecord, EndedUsage]]:
        """For each accepted request, return the usage record that a gateway sealed, and the counts of tokens that the
        worker reported."""
        return [(sealer.open(ended.sealed), ended) for ended in self.seen if ended.sealed]


class AccountedWorker:
    """Worker in this process. Its `witness` records the usage of every request that the worker has accepted."""

    def __init__(self, end: WorkerSession, identity: WorkerIdentity, witness: Witness) -> None:
        self.end = end
        self.identity = identity
        self.witness = witness
        self.task = asyncio.create_task(end.run())

    async def stop(self, drain_s: float = 5.0) -> None:
        """Drain the worker and stop it."""
        await self.end.drain(drain_s)
        await self.end.close()
        await asyncio.gather(self.task, return_exceptions=True)


async def start_worker(
    engine: Engine,
    bundle: Bundle,
    gateways: Sequence[str],
    *,
    gpus: float = 0.0,
    model: str = "sim",
    timing: Timing = PATIENT,
) -> AccountedWorker:
    """Start an engine and link it to the gateways as a worker."""
    info = await engine.start()
    number, witness = next(_numbers), Witness()
    identity = WorkerIdentity(
        f"{model}-a{number}",
        f"a{number}",
        model,
        version="v1",
        bundle_digest=bundle.digest,
        pod=f"pod-{number}",
        host=f"host-{number}",
    )
    end = WorkerSession(
        identity=identity,
        engine=engine,
        info=info,
        bundle=bundle,
        gateways=gateways,
        timing=timing,
        gpus=gpus,
        gpu="H100" if gpus else "",
        keeper=witness,
        idle_report_s=0.2,
    )
    return AccountedWorker(end, identity, witness)


class Switch:
    """A database that a test can switch off."""

    def __init__(self, insert: Callable[[Sequence[UsageRecord]], int]) -> None:
        self._insert = insert
        self.away = False

    def insert(self, records: Sequence[UsageRecord]) -> int:
        """Insert records. Raises StoreUnavailable while the database is switched off."""
        if self.away:
            raise StoreUnavailable("taken away by the test")
        return self._insert(records)


@asynccontextmanager
async def accounting_cluster(
    folder: Path, insert: Callable[[Sequence[UsageRecord]], int], text: str = LOOPBACK
) -> AsyncIterator[TestCluster]:
    """Run a gateway with usage accounting and without workers. `insert`: writes usage records to the database. `text`:
    the gateway's cluster.yaml."""
    gateway = Gateway(parse(text), folder, usage_store=UsageStore([SECRET], insert))
    await gateway.start()
    cluster = TestCluster(gateway)
    try:
        yield cluster
    finally:
        await cluster.channel.close()
        await gateway.stop(0)


def records(ledger: Ledger) -> list[UsageRecord]:
    """Return all usage records in order of time, without the records of idle replicas."""
    return [record for record in ledger.usage.records(UsageQuery(), limit=100_000) if record.tenant != "_idle"]


def idle_gpu_seconds(ledger: Ledger) -> float:
    """Return the GPU seconds of replicas that served no call."""
    return sum(record.gpu_seconds for record in ledger.usage.records(UsageQuery(tenant="_idle"), limit=100_000))
