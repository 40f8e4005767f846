"""The gateway's state of one epoch of one worker: the credit, the requests that run on the worker, and their sinks.

When a link ends, for whatever reason, `lost` is called once on each slot's sink, and no message of that epoch is
applied afterwards. Slots are not reused within a link.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Callable, Container, Sequence
from typing import NamedTuple, Protocol

import structlog

from cluster.api.demand import ComputedWork
from cluster.api.types import (
    CompatibilityKey,
    DrainState,
    EngineInfo,
    EngineLoad,
    EngineRequest,
    TokenOutput,
    WorkerIdentity,
)
from cluster.gateway.links.liveness import LinkLiveness
from cluster.gateway.links.prefill_pacing import PrefillPacing
from cluster.link.v1 import link_pb2 as pb
from cluster.policy.fairness.order import WaitingSequence
from cluster.policy.fairness.peer_backlog import ServedTotal
from cluster.process.call_errors import is_call_failure
from cluster.wire import codec
from cluster.wire.credit import Capacity, CreditBalance
from cluster.wire.demand_codec import work_from_pb
from cluster.wire.dial import CHUNK_BYTES
from cluster.wire.ended_requests import EndedUsage
from cluster.wire.fairness_codec import FlowBacklog, WeightedValue, add_charge, peer_backlogs_from_pb, served_from_pb
from cluster.wire.outbox import CommandBox

log = structlog.get_logger("link")

# Prompts with more bytes are sent in chunks on the Bulk stream, so that no large message delays a token.
TURN_PROMPT_BYTES = 32_768
MAX_REASON_CHARS = 2_000
"""Number of characters that are kept of the reason why a worker's engine has ended."""


class Sink(Protocol):
    """The receiver of the events of one slot.

    The link's reader calls the methods, which must be short and must not block. An exception from a method is passed to
    `failed`, and affects neither the link nor the other slots."""

    def accepted(self) -> None:
        """Handle the acceptance of the request by the engine."""

    def refused(self, reason: str, message: str, field: str) -> None:
        """Handle the refusal of the request by the engine. No further method is called."""

    heard_at: float
    """Monotonic time at which the last token arrived. The link sets the time before it calls `token`; the sink sets the
    time in `output`."""

    def token(self, token_id: int) -> None:
        """Handle an output of one token and nothing else, as a shortcut for `output`. Never called for the first
        token."""

    def output(self, output: TokenOutput) -> None:
        """Handle the tokens of one step. If the output has `finish`, no further method is called."""

    def lost(self, why: str) -> None:
        """Handle the end of the link. No further method is called."""

    def failed(self, error: BaseException) -> None:
        """Handle an exception of another method. `error`: the exception. The request has been aborted, and no further
        method is called."""


class LinkStream(NamedTuple):
    """Name under which a client may resume a sequence. `generation`: generation of the sequence's last resume, 0 if the
    sequence was not resumed. `begun_at`: the gateway from which the sequence was resumed, "" if irrelevant."""

    name: str
    generation: int = 0
    begun_at: str = ""


class LinkListener(Protocol):
    """The receiver of workers' reports. The methods are called by a link's reader and must not block."""

    def token_gaps(self, model: str) -> Callable[[float, int], None]:
        """Return a function that records gaps between tokens. Its arguments are a gap in seconds and the number of
        tokens that came after this gap."""

    def step_begun(self, link: WorkerLink, resumed: bool) -> None:
        """Handle the beginning of a step with requests that were sent for the step. `resumed`: whether resumed requests
        were among them."""

    def usage(self, link: WorkerLink, ended: Sequence[EndedUsage]) -> None:
        """Handle a worker's report of the usage of ended requests."""

    def served(self, link: WorkerLink, totals: Sequence[WeightedValue[ServedTotal]]) -> None:
        """Handle a worker's report of the service that the worker has counted for each tenant."""

    def peer_backlog(self, link: WorkerLink, gateway: str, waiting: Sequence[WeightedValue[FlowBacklog]]) -> None:
        """Handle another gateway's backlog for the worker's model."""

    def drain_state_changed(self, link: WorkerLink) -> None:
        """Handle a change of the worker's drain state."""


class WorkerLink:
    """The gateway's state of one epoch of one worker."""

    def __init__(self, identity: WorkerIdentity, info: EngineInfo, epoch: int, listener: LinkListener) -> None:
        self._listener = listener
        self._count_gaps = listener.token_gaps(identity.model)
        self.identity = identity
        self.info = info
        self.epoch = epoch
        self.compatibility_key = CompatibilityKey(identity.weight_digest, identity.bundle_digest, info.engine_class)
        self.pacing = PrefillPacing(info.max_num_batched_tokens)
        """Prefill pacing of the requests that this gateway sends to the worker."""
        self.load = EngineLoad()
        self.work = ComputedWork()
        """Work that the engine has computed since its start."""
        self.drain_state = DrainState.SERVING
        self.move_requests_at = float("inf")
        """Monotonic time at which the requests that still run on a draining worker must move to other workers."""
        self.liveness: LinkLiveness | None = None
        """Failure detection for the worker. Set and updated by the hub."""
        self.last_heard = time.monotonic()
        self.box = CommandBox()
        self.blobs: asyncio.Queue[pb.Blob] | None = None
        self._step_at = 0.0
        self._credit = CreditBalance()
        self._sinks: dict[int, Sink] = {}
        self._prefilling: dict[int, int] = {}
        self.prefill_tokens = 0
        """Number of tokens of this gateway's requests that run on the worker and have no output yet."""
        self._slots = itertools.count(1)
        self.closed = asyncio.Event()
        self.why = ""
        self.reason = "lost"
        """Reason of the link's end, in one word. `lost` means that the connection broke."""
        self.engine_ended = ""
        """Reason why the worker's engine has ended; "" until the worker reports an end."""
        self._ended = False

    def __repr__(self) -> str:
        return (
            f"<WorkerLink {self.identity.worker_id} epoch {self.epoch} {self.identity.model} "
            f"running {len(self._sinks)} free {self.free.sequences}>"
        )

    @property
    def name(self) -> str:
        """Name of the link, unique among all links that the gateway has had."""
        return f"{self.identity.worker_id}/{self.identity.incarnation}/{self.epoch}"

    @property
    def draining(self) -> bool:
        """Whether the worker has announced a drain, so that the end of the link is expected."""
        return self.drain_state in (DrainState.DRAINING, DrainState.DRAINED)

    @property
    def free(self) -> Capacity:
        """Credit that the worker has granted to this gateway and that is not used yet; zero once the link has ended."""
        return self._credit.free if not self._ended else Capacity(0, 0)

    @property
    def running(self) -> int:
        """Number of this gateway's requests that run on the worker."""
        return len(self._sinks)

    def submit(
        self,
        request: EngineRequest,
        sink: Sink,
        attempt: int = 1,
        sealed_record: bytes = b"",
        turn: WeightedValue[WaitingSequence] | None = None,
        earlier_tokens: int = 0,
        fresh_tokens: int = 0,
        stream: LinkStream | None = None,
    ) -> int:
        """Send a request to the worker and return the request's slot. The caller must have checked `free`.

        `sealed_record`: the usage record, which the worker returns with the request's usage. `earlier_tokens`: number
        of tokens that other workers have generated under that record; the worker returns this number too. `turn`: the
        tenant's flow and the charged service. `fresh_tokens`: number of tokens of a resumed request that are likely to
        be computed again, 0 for all. `stream`: the name by which another gateway may resume the request."""
        slot = next(self._slots)
        message = codec.submit_to_pb(slot, attempt, request)  # first, so that a failed encoding uses no credit
        if sealed_record:
            message.sealed_record = sealed_record
            message.earlier_tokens = earlier_tokens
        if turn is not None:
            add_charge(message, turn)
        message.fresh_tokens = fresh_tokens
        if stream is not None:
            message.stream, message.generation, message.begun_at = stream.name, stream.generation, stream.begun_at
        tokens = len(request.prompt_token_ids) + len(request.emitted_token_ids)
        expected = tokens - turn.value.cached_tokens if turn is not None else tokens
        blobs = self._prompt_blobs(message)
        # Nothing below can fail, so a request is either sent and fully counted, or neither.
        self._sinks[slot], self._prefilling[slot] = sink, tokens
        self.prefill_tokens += tokens
        self.pacing.add(slot, fresh_tokens or max(expected, 1), bool(request.emitted_token_ids))
        self._credit.spend(tokens)
        if self.blobs is not None:
            for blob in blobs:
                self.blobs.put_nowait(blob)
        self.box.submit(message)
        return slot

    def _prompt_blobs(self, message: pb.Submit) -> Sequence[pb.Blob]:
        """Move a long prompt from the Submit into chunks for the Bulk stream, if the Bulk stream is open. Returns the
        chunks."""
        if len(message.prompt_ids) <= TURN_PROMPT_BYTES or self.blobs is None:
            return ()
        key, data = f"prompt:{message.slot}:{message.attempt}", message.prompt_ids
        message.ClearField("prompt_ids")
        message.prompt_blob = key
        starts = range(0, len(data), CHUNK_BYTES)
        return [pb.Blob(key=key, data=data[at : at + CHUNK_BYTES], last=at + CHUNK_BYTES >= len(data)) for at in starts]

    def tokens_to_recompute(self, tokens: int) -> int:
        """Return how many of `tokens` the engine must compute again before the next token. The engine has computed all
        of them before.

        The engine reuses full KV blocks, except for the block with the last token."""
        size = max(self.info.block_size, 1)
        return tokens - max(tokens - 1, 0) // size * size

    @property
    def takes_new_requests(self) -> bool:
        """Whether the worker takes new requests."""
        return self.drain_state is DrainState.SERVING

    def command(self, command: pb.Command) -> None:
        """Send an operator's command to the worker."""
        self.box.command(command)

    def abort(self, slot: int) -> None:
        """Abort the request in a slot. No further method of the request's sink is called. Does nothing if the request
        has ended."""
        if self._sinks.pop(slot, None) is not None:
            self._prefilled(slot)
            self.box.aborts([slot])

    def _prefilled(self, slot: int) -> None:
        """Stop counting the prompt in a slot as waiting for prefill."""
        self.prefill_tokens -= self._prefilling.pop(slot, 0)
        self.pacing.remove(slot)

    def _sink_failed(self, slot: int, sink: Sink, error: BaseException) -> None:
        """Abort a request whose sink has raised an exception, and call `failed` on the sink. The link continues."""
        if not is_call_failure(error):
            raise error
        self.abort(slot)
        try:
            sink.failed(error)
        except Exception:
            log.exception("call_not_ended", worker=self.identity.worker_id, slot=slot)

    @property
    def sinks(self) -> Sequence[Sink]:
        """Sinks of the requests that run on the worker."""
        return list(self._sinks.values())

    def close(self, why: str, reason: str = "closed") -> None:
        """End this link from the gateway's side. `reason`: one word, used as a metric label."""
        self.why, self.reason = why, reason
        self.closed.set()

    # ---- called by the hub

    def apply(self, message: pb.WorkerTurn) -> bool:
        """Apply a message from the worker. Returns whether the worker's credit or drain state has changed."""
        self.last_heard = time.monotonic()
        for accepted in message.accepted:
            if (sink := self._sinks.get(accepted.slot)) is not None:
                self.pacing.mark_accepted(accepted.slot)
                try:
                    sink.accepted()
                except BaseException as error:
                    self._sink_failed(accepted.slot, sink, error)
        for refused in message.refused:
            if (sink := self._sinks.pop(refused.slot, None)) is not None:
                self._prefilled(refused.slot)
                try:
                    sink.refused(refused.reason, refused.message, refused.field)
                except BaseException as error:
                    self._sink_failed(refused.slot, sink, error)
        if message.HasField("step"):
            self._apply_step(message.step)
            before = self.pacing.resumed_tokens
            if self.pacing.begin_step():
                self._listener.step_begun(self, self.pacing.resumed_tokens < before)
        if message.HasField("served"):
            self._listener.served(self, served_from_pb(message.served))
        for gateway, waiting in peer_backlogs_from_pb(message.elsewhere):
            self._listener.peer_backlog(self, gateway, waiting)
        if message.usage:
            self._listener.usage(self, [codec.usage_from_pb(usage) for usage in message.usage])
        if message.engine_ended:
            self.engine_ended = message.engine_ended[:MAX_REASON_CHARS]
            self.close("its engine has ended", "lost")
        changed = False
        if message.HasField("load"):
            self.load = codec.load_from_pb(message.load)
        if message.HasField("work"):
            self.work = work_from_pb(message.work)
        if message.HasField("credit"):
            self._credit.apply_credit(message.credit.grant_id, message.credit.sequences, message.credit.tokens)
            self.box.grant_ack(message.credit.grant_id)
            changed = True
        if message.HasField("standing"):
            self.drain_state = codec.drain_state_from_pb(message.standing)
            stays_s = message.standing.stay_ms / 1000
            self.move_requests_at = (
                self.last_heard + stays_s if self.drain_state is DrainState.DRAINING else float("inf")
            )
            self._listener.drain_state_changed(self)
            changed = True
        return changed

    def _apply_step(self, step: pb.StepOutputs) -> None:
        sinks = self._sinks
        more = codec.slots_with_details(step)
        if more is not None:
            step_s = self._apply_tokens(step, more)
            if step_s:
                prompts = self._prefilling
                self.pacing.record_step(
                    step_s, sum(prompts.get(first.slot, 0) - first.cached_tokens for first in step.firsts)
                )
            if not more:
                return
        for slot, output in codec.outputs_from_pb(step, more):
            sink = sinks.get(slot)
            if sink is None:
                continue
            if slot in self._prefilling:
                self._prefilled(slot)
            if output.finish is not None:
                del sinks[slot]
            try:
                sink.output(output)
            except BaseException as error:
                self._sink_failed(slot, sink, error)

    def _apply_tokens(self, step: pb.StepOutputs, without: Container[int]) -> float:
        """Deliver tokens to the slots that got one token and nothing else. Slots in `without` are skipped.

        Returns the duration of the step in seconds, measured at slots that also got a token in the previous step; 0 if
        there are no such slots."""
        now, before = self.last_heard, self._step_at
        self._step_at = now
        sink_of, in_step = self._sinks.get, 0
        for slot, token_id in zip(step.slots, step.token_ids, strict=True):
            if slot in without:
                continue
            sink = sink_of(slot)
            if sink is None:
                continue
            if sink.heard_at == before:
                in_step += 1
            else:
                self._count_gaps(now - sink.heard_at, 1)
            sink.heard_at = now
            try:
                sink.token(token_id)
            except BaseException as error:
                self._sink_failed(slot, sink, error)
        if not in_step:
            return 0.0
        self._count_gaps(now - before, in_step)
        return now - before

    def end(self, why: str) -> None:
        """End the link: call `lost` once on the sink of every slot."""
        self._ended = True  # first, because a sink looks for another worker at once
        sinks, self._sinks = self._sinks, {}
        for slot, sink in sinks.items():
            try:
                sink.lost(why)
            except BaseException as error:
                self._sink_failed(slot, sink, error)
