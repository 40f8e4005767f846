"""The gateway's state of one connection (epoch) of one worker: the credit (capacity that the worker has granted), the
worker's reports, and the requests that run on the worker."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, Protocol

from cluster.api.adapters import ADAPTERS
from cluster.api.demand import ComputedWork
from cluster.api.pooling import pooling_tasks
from cluster.api.types import (
    PARSER_KINDS,
    RENDERER,
    CompatibilityKey,
    DrainState,
    EngineInfo,
    EngineLoad,
    EngineRequest,
    WorkerIdentity,
)
from cluster.gateway.links.bulk_sender import BulkSender
from cluster.gateway.links.link_adapters import LinkAdapters
from cluster.gateway.links.link_renders import LinkRenders
from cluster.gateway.links.liveness import LinkLiveness
from cluster.gateway.links.prefill_pacing import PrefillPacing
from cluster.gateway.links.report_costs import ADAPTER, FLOW, KV_BYTE, MESSAGE, PER_REQUEST, STRAY, USAGE
from cluster.gateway.links.slots import Sink, SlotTable
from cluster.link.v1 import link_pb2 as pb
from cluster.policy.fairness.order import WaitingSequence
from cluster.policy.fairness.peer_backlog import ServedTotal
from cluster.policy.routing.version_split import Build
from cluster.wire.codecs import codec
from cluster.wire.codecs.demand_codec import work_from_pb
from cluster.wire.codecs.fairness_codec import (
    FlowBacklog,
    WeightedValue,
    add_charge,
    peer_backlogs_from_pb,
    served_from_pb,
)
from cluster.wire.credit import Capacity, CreditBalance
from cluster.wire.ended_requests import EndedUsage
from cluster.wire.link_bounds import MAX_FLOWS, MAX_REPORTS, check
from cluster.wire.outbox import CommandBox

USAGE_SLICE = 32
FLOW_SLICE = 512
"""Numbers of usage reports and of flows that are applied at once, which takes about a millisecond."""
MAX_REASON_CHARS = 2_000
"""Number of characters that are kept of the reason why a worker's engine has ended."""


class LinkStream(NamedTuple):
    """The name of a sequence on links to workers. A client may resume the sequence under this name.

    `generation`: number of the last resume, 0 before the first. `begun_at`: incarnation (one start of the process) of
    the gateway from which the sequence was resumed. It is set if the payment for the prompt depends on whether that
    gateway still runs; else "".
    """

    name: str
    generation: int = 0
    begun_at: str = ""


class SubmittedRequest(NamedTuple):
    """A request to a worker. It holds the engine's request, the other fields of the Submit message, and
    `cached_tokens`, which is not sent."""

    request: EngineRequest
    attempt: int = 1
    sealed_record: bytes = b""
    """The open record, which the worker returns with the request's usage."""
    turn: WeightedValue[WaitingSequence] | None = None
    """The sequence's waiting-room entry and its tenant's weight."""
    earlier_tokens: int = 0
    """Number of tokens that other workers have generated under `sealed_record`; the worker returns this number too."""
    fresh_tokens: int = 0
    """Number of tokens of a resumed request that are likely to be computed again; 0 means all tokens."""
    stream: LinkStream | None = None
    """Name by which another gateway may resume the request."""
    cached_tokens: int = 0
    """Number of tokens of a new request that routing expects in the worker's cache. Only counted here, not sent."""

    @property
    def tokens(self) -> int:
        """Number of the request's tokens."""
        return len(self.request.prompt_token_ids) + len(self.request.emitted_token_ids)

    @property
    def paced_tokens(self) -> int:
        """Number of tokens that PrefillPacing counts for this request."""
        expected = self.tokens - self.turn.value.cached_tokens if self.turn is not None else self.tokens
        return self.fresh_tokens or max(expected, 1)

    @property
    def tokens_to_compute(self) -> int:
        """Number of tokens that the engine is likely to compute."""
        return self.fresh_tokens or max(self.tokens - self.cached_tokens, 1)

    def to_pb(self, slot: int) -> pb.Submit:
        """Encode the request. `slot`: the request's number on the link."""
        message = codec.submit_to_pb(slot, self.attempt, self.request)
        if self.sealed_record:
            message.sealed_record = self.sealed_record
            message.earlier_tokens = self.earlier_tokens
        if self.turn is not None:
            add_charge(message, self.turn)
        message.fresh_tokens = self.fresh_tokens
        if self.stream is not None:
            message.stream, message.generation, message.begun_at = self.stream
        return message


class LinkListener(Protocol):
    """The receiver of workers' reports. The task that reads a link calls the methods, which must not block."""

    def token_gaps(self, model: str) -> Callable[[float, int], None]:
        """Return a function that records gaps between tokens. Its arguments: a gap in seconds, and the number of tokens
        that arrived after this gap."""

    def step_begun(self, link: WorkerLink, resumed: bool) -> None:
        """Handle the beginning of a step that computes prompts of this gateway. `resumed`: whether prompts of resumed
        requests are among them."""

    def usage(self, link: WorkerLink, ended: Sequence[EndedUsage]) -> None:
        """Handle a worker's report of the usage of ended requests."""

    def served(
        self, link: WorkerLink, totals: Sequence[WeightedValue[ServedTotal]], *, continues: bool = False
    ) -> None:
        """Handle a worker's report of the service (weighted tokens) that the worker has counted for each tenant.
        `continues`: whether this is a further part of the last report."""

    def peer_backlog(self, link: WorkerLink, gateway: str, waiting: Sequence[WeightedValue[FlowBacklog]]) -> None:
        """Handle a report of what waits at another gateway for the worker's model."""

    def kv_blocks(self, link: WorkerLink, message: pb.KvBlocks) -> None:
        """Handle a worker's report of its KV blocks. Raises ValueError for a malformed report."""

    def drain_state_changed(self, link: WorkerLink) -> None:
        """Handle a change of the worker's drain state."""

    def adapters_changed(self, link: WorkerLink) -> None:
        """Handle a report of the worker's adapters in which adapters, digests or states have changed."""


class WorkerLink:
    """The gateway's state of one connection (epoch) of one worker."""

    def __init__(
        self,
        identity: WorkerIdentity,
        info: EngineInfo,
        epoch: int,
        listener: LinkListener,
        liveness: LinkLiveness,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`liveness`: failure detection for this connection; the hub updates it. `clock`: returns monotonic seconds."""
        self._clock = clock
        self._listener = listener
        self.identity = identity
        self.info = info
        self.parsers = frozenset(kind for kind in PARSER_KINDS if any(c.startswith(kind) for c in info.capabilities))
        """The kinds of parsers that the worker has: TOOL_PARSER, REASONING_PARSER."""
        self.tasks = frozenset(pooling_tasks(info.capabilities))
        """The worker's pooling tasks; empty if the worker's model generates tokens."""
        words = (word for word in info.capabilities if word.startswith(RENDERER))
        self.renderer = next(words, RENDERER).removeprefix(RENDERER)
        """Name of the worker's renderer of chats; "" if it has none."""
        self.epoch = epoch
        self.name = f"{identity.model}/{identity.worker_id}/{identity.incarnation}/{epoch}"
        """Name of the link, unique among all links that the gateway has had."""
        self.process = f"{identity.incarnation}@{identity.model}"
        """Name of the worker's process in breakers and losses. Another model's worker may send the same incarnation."""
        self.build = Build(identity.version, identity.bundle_digest, identity.weight_digest)
        """The worker's version, tokenizer bundle and weights, by which routing chooses workers for a call."""
        self.compatibility_key = CompatibilityKey(identity.weight_digest, identity.bundle_digest, info.engine_class)
        self.unseeded_key = self.compatibility_key.unseeded
        self.liveness = liveness
        self.load = EngineLoad()
        self.work = ComputedWork()
        """Work that the engine has computed since its start."""
        self.drain_state = DrainState.SERVING
        self.move_requests_at = float("inf")
        """Monotonic time at which the requests on a draining worker must move to other workers; else infinity."""
        self.prepares_until = float("inf")
        """Monotonic time until which another worker may compute a request before the request moves; after that, the
        time left of the drain is for the moves themselves."""
        self.box = CommandBox()
        self.bulk = BulkSender()
        self.adapters = LinkAdapters(
            supported=ADAPTERS in info.capabilities,
            send=self.box.adapters,
            mark_changed=self.mark_changed,
            states_changed=lambda: listener.adapters_changed(self),
        )
        self._credit = CreditBalance()
        self.pacing = PrefillPacing(info.max_num_batched_tokens)
        """Prefill pacing of the requests that this gateway sends to the worker."""
        gaps = listener.token_gaps(identity.model)
        self.slots = SlotTable(identity.worker_id, self.pacing, self.box.aborts, gaps)
        """This gateway's requests that run on the worker."""
        self._numbers = itertools.count(1)
        self.last_sent = 0.0
        """Monotonic time of the last request that was sent to the worker."""
        self.renders = LinkRenders(self._send_render)
        """Chats that the worker renders for this gateway."""
        self.closed = asyncio.Event()
        self.why = ""
        self.reason = "lost"
        """Reason of the link's end, in one word. `lost` means that the connection broke or the worker's engine
        ended."""
        self.engine_ended = ""
        """Reason why the worker's engine has ended; "" until the worker reports an end."""
        self.ended = False
        """Whether the link has ended, so that nothing more can be sent to the worker."""
        self._changes: set[str] = set()
        self.cost = 0.0
        """Cost of the worker's reports that was not charged yet (report_costs.py)."""

    def __repr__(self) -> str:
        return (
            f"<WorkerLink {self.identity.worker_id} epoch {self.epoch} {self.identity.model} "
            f"running {self.running} free {self.free.sequences}>"
        )

    @property
    def draining(self) -> bool:
        """Whether the worker has announced a drain. The end of its link is then expected."""
        return self.drain_state in (DrainState.DRAINING, DrainState.DRAINED)

    @property
    def takes_new_requests(self) -> bool:
        """Whether the worker takes new requests."""
        return self.drain_state is DrainState.SERVING

    @property
    def free(self) -> Capacity:
        """Unused credit: capacity that the worker has granted to this gateway and that no request uses. Zero once the
        link has ended."""
        return self._credit.free if not self.ended else Capacity(0, 0)

    @property
    def running(self) -> int:
        """Number of this gateway's requests that run on the worker."""
        return len(self.slots)

    def report_changes_to(self, changed_workers: set[str]) -> None:
        """Add the worker's id to `changed_workers`, now and after each later change of a value that routing reads. The
        links of a model share the set, so that a decision reads only the workers that have changed."""
        self._changes = changed_workers
        self.mark_changed()

    def mark_changed(self) -> None:
        """Record that a value that routing reads has changed."""
        self._changes.add(self.identity.worker_id)

    def submit(self, submitted: SubmittedRequest, sink: Sink) -> int:
        """Send a request to the worker and return its slot (its number on the link). The caller must have checked
        `free`."""
        slot = next(self._numbers)
        message = submitted.to_pb(slot)  # first, so that a failed encoding uses no credit
        self.last_sent = self._clock()
        tokens = submitted.tokens
        chunks = self.bulk.extract_prompt(message)
        # Nothing below can fail, so a request is either sent and fully counted, or neither.
        self.slots.add(
            slot,
            sink,
            tokens,
            submitted.paced_tokens,
            bool(submitted.request.emitted_token_ids),
            submitted.tokens_to_compute,
            self.last_sent,
            holds_output=0 < submitted.fresh_tokens < len(submitted.request.emitted_token_ids),
        )
        self._credit.spend(tokens)
        self.cost -= PER_REQUEST
        self.mark_changed()
        if chunks:
            self.bulk.send(chunks)
        self.box.submit(message)
        return slot

    def _send_render(self, render: pb.Render) -> None:
        self.bulk.send_chat(render)
        self.box.render(render)

    def abort(self, slot: int) -> None:
        """Abort the request in a slot. No further method of the request's sink is called. Does nothing if the request
        has ended."""
        self.slots.abort(slot)
        self.mark_changed()

    def close(self, why: str, reason: str = "closed") -> None:
        """End this link from the gateway's side. `why`: a text for people. `reason`: one word, used as a metric
        label."""
        self.why, self.reason = why, reason
        self.closed.set()

    # ---- called by the hub

    def apply(self, message: pb.WorkerTurn) -> bool:
        """Apply a message from the worker. Returns whether waiting work may be sent now: the worker's credit, drain
        state or adapters have changed, or the worker has room for another chat to render. Raises ValueError for a
        message that cannot be applied."""
        now = self._clock()
        running, prefill_tokens = len(self.slots), self.slots.prefill_tokens
        changed = False
        if message.HasField("adapters"):  # before refusals, whose calls are routed again
            changed = self.adapters.apply(message.adapters)
            self.cost += ADAPTER * len(message.adapters.adapters)
        for accepted in message.accepted:
            self.slots.accept(accepted.slot)
        for refused in message.refused:
            check(refused)
            self.slots.refuse(refused)
        if message.refused and message.HasField("adapters"):  # the report may be newer than the refusals
            changed |= self.adapters.apply(message.adapters)
        strays = self.slots.strays
        if message.HasField("step"):
            self.slots.apply_step(message.step, now)
            before = self.pacing.resumed_tokens
            if self.pacing.begin_step():
                self._listener.step_begun(self, self.pacing.resumed_tokens < before)
            if strays := self.slots.strays - strays:
                self.cost += MESSAGE + STRAY * strays
        else:
            self.cost += MESSAGE
        if message.HasField("kv_blocks"):
            self._listener.kv_blocks(self, message.kv_blocks)
            self.cost += KV_BYTE * (len(message.kv_blocks.stored) + len(message.kv_blocks.removed))
        if message.engine_ended:
            self.engine_ended = message.engine_ended[:MAX_REASON_CHARS]
            self.close("its engine has ended", "lost")
        for piece in message.rendered:
            check(piece)
            changed |= self.renders.apply(piece)
        if message.HasField("load"):
            self._set_load(codec.load_from_pb(message.load))
        if message.HasField("work"):
            self.work = work_from_pb(message.work)
        if message.HasField("credit"):
            self._credit.apply_credit(message.credit.grant_id, message.credit.sequences, message.credit.tokens)
            self.box.grant_ack(message.credit.grant_id)
            changed = True
        if message.HasField("standing"):
            self.drain_state = codec.drain_state_from_pb(message.standing)
            stays_s = message.standing.stay_ms / 1000
            self.move_requests_at = now + stays_s if self.drain_state is DrainState.DRAINING else float("inf")
            self.prepares_until = self.move_requests_at + stays_s / 2  # the drain goes on for as long as they may stay
            self._listener.drain_state_changed(self)
            changed = True
        if changed or len(self.slots) != running or self.slots.prefill_tokens != prefill_tokens:
            self.mark_changed()
        return changed

    def apply_reports(self, message: pb.WorkerTurn) -> Iterator[bool]:
        """Apply the reports of a message that may be long: service, backlogs and usage. Yields True between slices that
        take about a millisecond each. Raises ValueError for reports beyond the bounds, before any is applied.

        Once the link has ended, only usage is applied.
        """
        reports, served, backlogs = message.usage, message.served.flows, message.elsewhere
        flows = len(served) + sum(len(each.flows) for each in backlogs)
        for name, count, most in (("usage", len(reports), MAX_REPORTS), ("flows", flows, MAX_FLOWS)):
            if count > most:
                raise ValueError(f"{name}: {count} in a message, at most {most} are allowed")
        self.cost += USAGE * len(reports) + FLOW * (flows + len(backlogs))
        for at in range(0, len(reports), USAGE_SLICE):
            if at:
                yield True
            self._listener.usage(self, [codec.usage_from_pb(usage) for usage in reports[at : at + USAGE_SLICE]])
        if message.HasField("served"):
            self._listener.served(self, served_from_pb(served[:FLOW_SLICE]))
        for at in range(FLOW_SLICE, len(served), FLOW_SLICE):
            yield True
            if not self.ended:
                self._listener.served(self, served_from_pb(served[at : at + FLOW_SLICE]), continues=True)
        for gateway, waiting in peer_backlogs_from_pb(message.elsewhere):
            if not self.ended:
                self._listener.peer_backlog(self, gateway, waiting)
                if len(waiting) > FLOW_SLICE // 4:
                    yield True

    def _set_load(self, load: EngineLoad) -> None:
        if (load.waiting, load.kv_usage) != (self.load.waiting, self.load.kv_usage):
            self.mark_changed()
        self.load = load

    def apply_beat(self, beat: pb.WorkerBeat, now: float) -> None:
        """Apply a heartbeat. `now`: the time by liveness.Waking, a clock that does not count the gateway's own
        delays."""
        self._set_load(codec.load_from_pb(beat.load))
        self.liveness.record_beat(self.load, beat.acked_seq, beat.sent_seq, now)

    def end(self, why: str) -> None:
        """End the link: call `lost` once on the sink of every slot."""
        self.ended = True  # first, because a sink looks for another worker at once
        self.mark_changed()
        self.slots.lose(why)
        self.renders.lose()
