"""The simulated gateway of the load test `routing` decides like a real gateway: after the same events, both send a call
to the same worker."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Sequence
from random import Random

import pytest

from cluster.api.types import KV_EVENTS, EngineInfo, EngineRequest, FinishReason, Sampling, TokenOutput, WorkerIdentity
from cluster.gateway.calls.call import Call
from cluster.gateway.calls.sequences.sequence import OutputSequence
from cluster.gateway.links.liveness import LinkLiveness
from cluster.gateway.links.worker_link import WorkerLink
from cluster.gateway.scheduling.scheduler import Scheduler
from cluster.gateway.scheduling.service_charges import ServiceCharges
from cluster.gateway.scheduling.worker_events import WorkerEvents
from cluster.link.v1 import link_pb2 as pb
from cluster.observe.metrics import Metrics
from cluster.policy.fairness.fair_queue import FairOrder
from cluster.policy.fairness.waiting_room import WaitingRoom
from cluster.policy.kv_cache.changes import KvChange
from cluster.policy.kv_cache.prefix_hashes import prefix_hashes, seed_of
from cluster.policy.routing.fleet import choose
from cluster.policy.routing.router import RouteCall
from cluster.policy.scheduling.hedging import HedgingPolicy
from cluster.policy.scheduling.scheduling_policy import SchedulingPolicy
from cluster.policy.scheduling.warm_sequences import FRESH_S
from cluster.policy.scheduling.worker_losses import WorkerLosses
from cluster.policy.scheduling.workers import Workers
from cluster.policy.tenants.policy import TenantPolicy
from cluster.wire.codecs.codec import StepColumns
from cluster.wire.codecs.kv_codec import kv_blocks_to_pb
from cluster.wire.credit import Grant
from loadtests.routing.calls import BLOCK_TOKENS, Prompt, RoutedCall
from loadtests.routing.gateway import RoutingGateway
from tests.support.linked_scheduler import Host, PlainText

WORKERS, SLOTS, MAX_TOKENS = 3, 4, 64
INFO = EngineInfo(
    "float32", "sim", "0", BLOCK_TOKENS, 1000, SLOTS, 2048, 1 << 20, 32_000, capabilities=(KV_EVENTS,)
)  # fmt: skip
OPERATIONS = ("enter", "enter", "credit", "credit", "first", "first", "end", "blocks", "wait")


class Both:
    """A real gateway's scheduler and the simulated gateway, in virtual time. Each operation is applied to both."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.serial = itertools.count(1)
        metrics = Metrics("test")
        self.charges = ServiceCharges({"standard": 0}, metrics)
        room = WaitingRoom(max_requests=10**6, max_tokens=10**12, max_wait_s=1e9, order_of=self.charges.fair.order)
        self.scheduler = Scheduler(Host(), room, self.charges, metrics, lambda: self.now, 1e9, policy_of=self.policy_of)
        events = self.events = WorkerEvents(self.scheduler, metrics, lambda: self.now)
        self.links: list[WorkerLink] = []
        for number in range(WORKERS):
            identity = WorkerIdentity(str(number), f"i{number}", "m", weight_digest="weights", node=str(number))
            link = WorkerLink(identity, INFO, number + 1, events, LinkLiveness(0.0, 1.0, 1.0), lambda: self.now)
            events.link_up(link)
            self.links.append(link)
        self.simulated = RoutingGateway(
            0,
            WORKERS,
            lambda prefix: choose,
            lambda model: FairOrder(),
            lambda call, worker: self.sent.append((call.call_id, worker)),
            lambda waiting: None,
            SLOTS,
            knows_blocks=True,
            hedger=HedgingPolicy(0.0),
        )
        for number in range(WORKERS):
            self.simulated.join(number)
            self.report(number, ())
        self.sent: list[tuple[str, int]] = []
        """Decisions of the simulated gateway."""
        self.calls: dict[str, Call] = {}
        self.prompts: dict[str, Prompt] = {}
        self.granted = [(0, 0)] * WORKERS

    def policy_of(
        self, room: WaitingRoom, workers: Workers, resume_wait_s: float, losses: WorkerLosses
    ) -> SchedulingPolicy:
        """Return the real gateway's policy, and store `workers`."""
        self.workers = workers
        return SchedulingPolicy(room, workers, resume_wait_s, losses)

    def enter(self, blocks: Sequence[int], tokens: int) -> None:
        """Add a call whose prompt begins with these blocks."""
        key = f"c{next(self.serial)}"
        prompt = self.prompts[key] = Prompt("t", tokens, MAX_TOKENS, tuple(blocks))
        call = Call(key, "m", TenantPolicy("t", handle="t"), 0, self.now, None, lambda: self.now, self.scheduler.events)
        request = EngineRequest("", self.ids(prompt), Sampling(max_tokens=MAX_TOKENS))
        call.sequences.append(OutputSequence(call, 0, request, PlainText()))
        self.calls[key] = call
        model = self.scheduler.host.directory.find("m")
        assert model is not None
        self.scheduler.enter(call, model)
        self.simulated.enter(RoutedCall(key, prompt, 0, self.now), self.now)

    @staticmethod
    def ids(prompt: Prompt) -> list[int]:
        """Return the token ids of a prompt. Prompts with equal blocks have equal token ids."""
        whole = [block for block in prompt.blocks[: prompt.whole] for _ in range(BLOCK_TOKENS)]
        return [*whole, *range(prompt.prompt_tokens - len(whole))]

    def credit(self, number: int, sequences: int, tokens: int) -> None:
        """Let a worker grant further credit: a number of sequences and of prompt tokens."""
        before, link = self.granted[number], self.links[number]
        total = self.granted[number] = (before[0] + sequences, before[1] + tokens)
        grant = next(self.serial)
        link.apply(
            pb.WorkerTurn(seq=next(self.serial), credit=pb.Credit(grant_id=grant, sequences=total[0], tokens=total[1]))
        )
        self.events.link_changed(link)
        self.simulated.granted(number, Grant(number, grant, *total), self.now)

    def report(self, number: int, blocks: Sequence[int]) -> None:
        """Report the blocks that a worker holds. All blocks together are a prefix of one prompt."""
        ids = [block for block in blocks for _ in range(BLOCK_TOKENS)]
        real = KvChange(True, prefix_hashes(ids, BLOCK_TOKENS, seed_of("")))
        for message in kv_blocks_to_pb(real):
            self.scheduler.worker_caches.report(self.links[number], message)
        self.simulated.apply(number, KvChange(True, prefix_hashes(blocks, 1, seed_of("t"))))

    def output(self, key: str, finish: bool) -> None:
        """Let a worker send the first output of a call; with `finish`, end the call."""
        (sequence,) = self.calls[key].sequences
        link, prompt = sequence.link, self.prompts[key]
        assert link is not None
        begun = sequence.state.value != "sent"
        cached = 0 if begun else min(prompt.whole, 1) * BLOCK_TOKENS
        columns = StepColumns()
        counts = (None, None) if begun else (prompt.prompt_tokens, cached)
        reason = FinishReason.LENGTH if finish else None
        columns.add(sequence.slot, TokenOutput("", [7], reason, None, *counts))
        worker = int(link.identity.worker_id)
        link.apply(pb.WorkerTurn(seq=next(self.serial), step=columns.to_pb()))
        if not begun:
            self.simulated.first_output(worker, key, cached, self.now)
        if finish:
            self.simulated.ended(key, self.now)
            self.scheduler.leave(self.calls.pop(key))

    def read_workers(self) -> None:
        """Let the real gateway read the state of all workers now. Otherwise it would read a changed worker only at its
        next decision, but the simulated gateway reads all workers at each decision."""
        for link in self.links:
            link.mark_changed()
        self.workers.route(RouteCall("m", 1), self.now)

    def decisions(self) -> dict[str, int]:
        """Map each running call that the real gateway has sent to the number of its worker."""
        sent = {key: call.sequences[0].link for key, call in self.calls.items()}
        return {key: int(link.identity.worker_id) for key, link in sent.items() if link is not None}


@pytest.mark.parametrize("seed", range(12))
async def test_both_decide_alike(seed: int) -> None:
    """After any events, the simulated and the real gateway send each call at the same event and to the same worker."""
    chance, both = Random(seed), Both()
    bases = [list(range(100 * base, 100 * base + 12)) for base in range(4)]
    for _ in range(150):
        both.now += FRESH_S + chance.random()
        both.read_workers()
        operation = chance.choice(OPERATIONS)
        running = sorted(both.decisions())
        if operation == "enter":
            blocks = chance.choice(bases)[: chance.randint(1, 12)]
            both.enter(blocks, len(blocks) * BLOCK_TOKENS + chance.randint(1, BLOCK_TOKENS - 1))
        elif operation == "credit":
            both.credit(chance.randrange(WORKERS), chance.randint(0, 2), chance.choice([1000, 8000]))
        elif operation == "blocks":
            both.report(chance.randrange(WORKERS), chance.choice(bases)[: chance.randint(0, 12)])
        elif operation == "wait":
            both.now += 6.0
            both.scheduler.upkeep.expire()
            both.simulated.index.maintain(both.now, 1000)
            if both.simulated.policy.aside.models:
                both.simulated.pump(both.now)
        elif running:
            key = chance.choice(running)
            if operation == "end" or both.calls[key].sequences[0].state.value == "sent":
                both.output(key, operation == "end")
        both.read_workers()
        await asyncio.sleep(0)
        assert {key: worker for key, worker in both.sent if key in both.calls} == both.decisions()
    assert len(both.sent) > 15
    assert len({worker for _, worker in both.sent}) == WORKERS
