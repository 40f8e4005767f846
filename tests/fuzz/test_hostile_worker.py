"""A worker of another model that sends hostile messages of valid types, beside a worker that serves calls."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
import time
from pathlib import Path

import grpc
import pytest

from cluster.config.document import parse
from cluster.gateway.optional_parts import UsageStore
from cluster.gateway.server import Gateway
from cluster.ledger.rows import UsageQuery
from cluster.ledger.store import Ledger
from cluster.wire.bundle import Bundle
from cluster.wire.tls import TlsFiles
from tests.gateway.links.test_peer_identity import config, make_files
from tests.support.accounts import SECRET
from tests.support.calls import chat
from tests.support.cluster import TestCluster, sim_engine, until
from tests.support.cpu import slowness
from tests.support.fuzz import SECONDS

pytestmark = pytest.mark.slow

MAX_GROWTH_MIB = 200
STALL_S = 0.5
"""Maximum CPU time that one pass of the event loop may take."""


class LoopCpu:
    """The longest CPU time between two turns of a task in the event loop."""

    def __init__(self) -> None:
        self.longest_s = 0.0

    async def watch(self) -> None:
        """Measure until cancelled."""
        before = time.thread_time()
        while True:
            await asyncio.sleep(0.01)
            now = time.thread_time()
            self.longest_s, before = max(self.longest_s, now - before), now


def rss_mib() -> int:
    """Return the resident memory of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") >> 20


async def call_until(ended: asyncio.Event, cluster: TestCluster) -> list[int]:
    """Make calls to the victim's model. Returns the number of tokens of each answer."""
    answers: list[int] = []
    while not ended.is_set():
        tokens = len(answers) % 5 + 1
        answer = await cluster.stub.Chat(chat(max_tokens=tokens, ignore_eos=True), timeout=60)
        answers.append(answer.usage.completion_tokens)
    return answers


async def call_hostile(ended: asyncio.Event, cluster: TestCluster) -> int:
    """Make calls to the hostile worker's model, so that it gets sealed records. Returns the number of answers."""
    answers = 0
    while not ended.is_set():
        with contextlib.suppress(grpc.aio.AioRpcError):  # its worker answers when it likes
            await cluster.stub.Chat(chat(model="other", max_tokens=2), timeout=0.3)
            answers += 1
        await asyncio.sleep(0.01)
    return answers


@pytest.mark.thorough
async def test_a_hostile_worker_changes_nothing_of_others(tmp_path: Path, checkpoint: Path, bundle: Bundle) -> None:
    """Whatever a worker with another model's certificate sends, each call of the victim has exactly its usage row, the
    victim's link stays, and neither memory nor a pass of the event loop grows beyond bounds."""
    make_files(tmp_path)
    ledger = Ledger(f"sqlite:///{tmp_path / 'ledger.db'}")
    ledger.upgrade()
    gateway = Gateway(parse(config(tmp_path)), tmp_path / "g", usage_store=UsageStore([SECRET], ledger.usage.insert))
    await gateway.start()
    cluster = TestCluster(gateway)
    files = TlsFiles(tmp_path / "worker.crt", tmp_path / "worker.key", tmp_path / "ca.crt")
    worker = await cluster.add_worker(sim_engine(checkpoint, decode_ms=0.5), bundle, tls=files)
    (link,) = gateway.hub.links
    await cluster.stub.Chat(chat(max_tokens=1, ignore_eos=True), timeout=60)
    ended, cpu, before_mib = asyncio.Event(), LoopCpu(), rss_mib()
    watching = asyncio.create_task(cpu.watch())
    calling = asyncio.create_task(call_until(ended, cluster))
    calling_hostile = asyncio.create_task(call_hostile(ended, cluster))
    seed = os.environ.get("FUZZ_SEED", str(time.time_ns() % 1_000_000))
    victim = (worker.identity.worker_id, worker.identity.incarnation, bundle.digest)
    arguments = (gateway.endpoints["link"], str(tmp_path), str(SECONDS), seed, *victim)
    hostile = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "tests.support.hostile_worker", *arguments), stdout=asyncio.subprocess.PIPE
    )
    output, _ = await hostile.communicate()
    ended.set()
    answers, hostile_answers = await calling, await calling_hostile
    watching.cancel()
    slow, grown_mib = slowness(), rss_mib() - before_mib
    assert link in gateway.hub.links, f"seed {seed}: the victim's link has ended: {link.why}"
    accounting = gateway.dispatch.accounting
    assert accounting is not None
    await until(lambda: len(gateway.hub.links) == 1, "the hostile worker has left")
    await until(lambda: not len(accounting.accounts) and not accounting.statistics().pending, "all is written")
    rows = [row for row in ledger.usage.records(UsageQuery(model="sim"), limit=10**6) if row.tenant != "_idle"]
    print(
        f"seed {seed}: {int(output)} hostile messages, {len(answers)} calls and {hostile_answers} of its own, longest "
        f"pass {cpu.longest_s:.3f} s of CPU ({slow:.1f} times slower), {grown_mib} MiB, refused {accounting.refused}, "
        f"{accounting.conflicts} conflicts"
    )
    await worker.stop()
    await cluster.channel.close()
    await gateway.stop(0)
    ledger.close()
    assert int(output) > 0
    assert len(answers) > 2
    assert sorted(row.completion_tokens for row in rows) == sorted([1, *answers]), f"seed {seed}"
    assert not any(row.delivered_unknown for row in rows)
    assert not accounting.conflicts
    assert cpu.longest_s < STALL_S * slow, f"seed {seed}"
    assert grown_mib < MAX_GROWTH_MIB, f"seed {seed}"
