"""Accounting under faults. Gateways are killed at random points, their disks are deleted and the database is stopped.
Every admitted call is still recorded exactly once."""

from __future__ import annotations

import asyncio
import json
import os
import random
import shutil
import signal
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
import yaml

from cluster.ledger.store import Ledger
from cluster.ledger.usage.sealed_records import Sealer
from cluster.policy.tenants.policy import TenantPolicy
from cluster.process.ports import free_port
from cluster.v1 import inference_pb2_grpc as pb_grpc
from cluster.wire.bundle import Bundle
from cluster.wire.dial import Timing
from loadtests.children import Child, Children
from loadtests.serving.ours import LISTENERS, exec_gateway
from tests.support import postgres
from tests.support.accounts import SECRET, AccountedWorker, records, start_worker
from tests.support.calls import chat
from tests.support.cluster import sim_engine, until
from tests.support.keyed import PEPPER
from tests.support.shell import headrace

pytestmark = pytest.mark.slow

OWN_CONNECTION = (("grpc.use_local_subchannel_pool", 1), ("grpc.max_reconnect_backoff_ms", 200))
CALLERS = 6
MODEL = "sim"


class Database:
    """A database that a test can make unavailable. PostgreSQL is killed; a SQLite file is locked."""

    def __init__(self, url: str, server: postgres.PostgresServer | None) -> None:
        self.url = url
        self._server = server
        self._lock: sqlite3.Connection | None = None

    def take_away(self) -> None:
        """Make the database unavailable until `bring_back`."""
        if self._server is not None:
            self._server.kill()
            return
        self._lock = sqlite3.connect(
            self.url.removeprefix("sqlite:///"), isolation_level=None, timeout=60, check_same_thread=False
        )
        self._lock.execute("BEGIN IMMEDIATE")

    def bring_back(self) -> None:
        """Make the database available again, with the same data."""
        if self._server is not None:
            self._server.start()
        elif self._lock is not None:
            self._lock.execute("ROLLBACK")
            self._lock.close()


class Site:
    """Two gateway processes at fixed ports. Each incarnation has its own folder, which is deleted when the incarnation
    is killed."""

    def __init__(self, children: Children, folder: Path, database_url: str) -> None:
        (folder / "secret").write_bytes(SECRET)
        (folder / "pepper").write_text(PEPPER)
        self._children = children
        self._folder = folder
        self._lives = 0
        self._text = [self._configuration(folder, database_url) for _ in range(2)]
        self.running: list[tuple[Child, Path]] = [self._start(number) for number in range(2)]

    @staticmethod
    def _configuration(folder: Path, database_url: str) -> str:
        ports = {name: f"127.0.0.1:{free_port()}" for name in LISTENERS}
        return yaml.safe_dump(
            {
                "api_version": "headrace/v1",
                "name": "kills",
                "gateway": {"listen": ports, "drain_timeout_s": 0},
                "auth": {
                    "cluster_secret_file": str(folder / "secret"),
                    "api_keys": {"pepper_file": str(folder / "pepper")},
                },
                "store": {"database_url": database_url},
                "observe": {"log_level": "warning"},
                "models": [{"name": MODEL, "source": "sim:///nowhere"}],
            }
        )

    def address(self, number: int, listener: str) -> str:
        """Return the address of a gateway's listener, which is the same for all its incarnations."""
        return str(yaml.safe_load(self._text[number])["gateway"]["listen"][listener])

    def config_file(self, number: int) -> Path:
        """Return the path of the configuration file that gateway `number` uses since its last start."""
        return self.running[number][1] / "cluster.yaml"

    def _start(self, number: int) -> tuple[Child, Path]:
        self._lives += 1
        name = f"gateway-{number}-{self._lives}"
        return exec_gateway(self._children, self._folder, name, self._text[number]), self._folder / name

    async def knows_callers(self, number: int) -> None:
        """Wait until a gateway has loaded the tenants and keys. It can then serve without the database."""
        home = self.running[number][1]
        await until((home / "state" / "snapshot.json").exists, f"gateway {number} knows who may call")

    async def kill(self, number: int) -> None:
        """Kill a gateway with SIGKILL, delete its disk, and start its next incarnation."""
        child, home = self.running[number]
        await until(lambda: bool(child.commands()), "its process has begun")
        (process,) = child.commands()
        os.kill(process.pid, signal.SIGKILL)
        await until(lambda: not child.alive, "it is gone")
        shutil.rmtree(home)
        self.running[number] = self._start(number)


async def call_for_ever(address: str, key: str, chance: random.Random, stop: asyncio.Event) -> None:
    """Make calls of random kinds one after the other, until `stop` is set. The kinds are plain, streamed, with several
    outputs, cancelled, and past the deadline. Failures are ignored."""
    metadata = (("authorization", f"Bearer {key}"),)
    async with grpc.aio.insecure_channel(address, options=OWN_CONNECTION) as channel:
        stub = pb_grpc.InferenceStub(channel)
        while not stop.is_set():
            request = chat(str(chance.random()), max_tokens=chance.randrange(1, 60), ignore_eos=True)
            try:
                await _one(stub, request, metadata, chance)
            except grpc.aio.AioRpcError:
                await _pause(stop)


async def _one(stub: Any, request: Any, metadata: Any, chance: random.Random) -> None:
    kind = chance.randrange(5)
    if kind == 0:
        request.n = 2
    if kind in (0, 1):
        await stub.Chat(request, metadata=metadata, timeout=10)
    elif kind == 2:
        await stub.Chat(request, metadata=metadata, timeout=0.05)
    else:
        stream = stub.StreamChat(request, metadata=metadata, timeout=10)
        pieces = chance.randrange(1, 12) if kind == 3 else 10**6
        async for _ in stream:
            pieces -= 1
            if not pieces:
                stream.cancel()
                return


async def _pause(stop: asyncio.Event) -> None:
    try:
        await asyncio.wait_for(stop.wait(), 0.05)
    except TimeoutError:
        return


@pytest.fixture(params=[pytest.param("sqlite", marks=pytest.mark.long), "postgresql"])
def database(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Provide an empty database of each kind; a test runs once for each."""
    if request.param == "sqlite":
        yield Database(f"sqlite:///{tmp_path / 'ledger.db'}", None)
        return
    with postgres.running() as server:
        monkeypatch.setenv("HEADRACE_DATABASE_PASSWORD", postgres.PASSWORD)
        yield Database(server.new_database().replace(f":{postgres.PASSWORD.replace(' ', '%20')}@", "@"), server)


@pytest.mark.thorough
async def test_every_admitted_call_is_there_once(
    database: Database, tmp_path: Path, checkpoint: Path, bundle: Bundle
) -> None:
    """After gateways were killed five times, the ledger has each sequence that a worker has accepted, exactly once, and
    no others. Two kills happen while the database is down. After the second of these, only the workers have the
    records."""
    chance = random.Random(20261124)
    ledger = await asyncio.to_thread(Ledger, database.url, peppers=[PEPPER.encode()])
    await asyncio.to_thread(ledger.upgrade)
    await asyncio.to_thread(ledger.tenants.create, TenantPolicy("acme"))
    key = (await asyncio.to_thread(ledger.keys.create, "acme", "")).secret

    async with Children(tmp_path / "logs", term_s=1.0) as children:
        site = Site(children, tmp_path, database.url)
        timing = Timing(redial_max_s=0.3)
        links = [site.address(number, "link") for number in range(2)]
        workers = [
            await start_worker(sim_engine(checkpoint, decode_ms=3), bundle, links, timing=timing) for _ in range(2)
        ]
        stop = asyncio.Event()
        callers = [
            asyncio.create_task(call_for_ever(site.address(i % 2, "grpc"), key, random.Random(chance.random()), stop))
            for i in range(2 * CALLERS)
        ]
        more = _accepts(workers, chance)
        await more("calls are accepted at first")
        await site.kill(0)
        await more("calls are accepted after a kill")
        await site.knows_callers(0)
        await asyncio.to_thread(database.take_away)
        await more("calls are accepted without a database")
        await site.kill(1)
        await more("one gateway serves without a database")
        await site.kill(0)  # now only the workers have the records
        assert sum(worker.end.statistics().unacked_usage for worker in workers) > 0
        await asyncio.to_thread(database.bring_back)
        await more("calls are accepted when the database is back")
        for number in (1, 0):
            await site.kill(number)
            await more("calls are accepted after another kill")

        stop.set()
        await asyncio.gather(*callers)
        await until(lambda: all(w.end.statistics().running == 0 for w in workers), "nothing runs")
        await until(
            lambda: all(w.end.statistics().unacked_usage == 0 for w in workers),
            "workers have their acknowledgements",
            60,
        )
        accepted: dict[str, list[tuple[int, int]]] = {}
        sealer = Sealer([SECRET])
        for worker in workers:
            for opened, usage in worker.witness.accepted(sealer):
                accepted.setdefault(opened.record_id, []).append((usage.generated_tokens, usage.written_tokens))
        found = await asyncio.to_thread(records, ledger)
        assert sorted(one.record_id for one in found) == sorted(accepted)
        for one in found:
            generated = [g for g, _ in accepted[one.record_id]]
            assert max(generated) <= one.generated_tokens <= sum(generated)
            assert one.completion_tokens <= one.generated_tokens
            assert (one.tenant, one.model) == ("acme", MODEL)
            if one.delivered_unknown:
                assert one.completion_tokens in [w for _, w in accepted[one.record_id]]
        unknown = [one for one in found if one.delivered_unknown]
        assert unknown, "calls of the killed gateways were reported by workers"
        assert len(unknown) < len(found), "calls of living gateways have exact records"

        done = await asyncio.to_thread(
            headrace, "usage", "--group-by", "tenant,model", "--json", "-f", str(site.config_file(0))
        )
        (row,) = json.loads(done.stdout)
        calls = {record.request_id for record in found}  # each sequence of a call has a record
        assert (row["tenant"], row["requests"]) == ("acme", len(calls))
        assert row["completion_tokens"] == sum(one.completion_tokens for one in found)
        for worker in workers:
            await worker.stop()
    ledger.close()


def _accepts(workers: list[AccountedWorker], chance: random.Random) -> Callable[[str], Any]:
    """Return a function that waits until a random number of further calls have ended at the workers."""

    async def more(what: str) -> None:
        wanted = sum(len(worker.witness.seen) for worker in workers) + chance.randrange(15, 60)
        await until(lambda: sum(len(worker.witness.seen) for worker in workers) >= wanted, what, 60)

    return more
