"""One epoch of one worker, as the gateway sees it: what may be sent, what runs, and where its news goes.

When a link ends, for whatever reason, its slots are told once (`Sink.lost`) and nothing of that epoch is applied
afterwards. Slots are not reused within a link.
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
from cluster.policy.fairness.order import Waiting
from cluster.policy.fairness.peer_backlog import ServedTotal
from cluster.process.call_errors import is_call_failure
from cluster.wire import codec
from cluster.wire.credit import Capacity, CreditBalance
from cluster.wire.demand_codec import work_from_pb
from cluster.wire.dial import CHUNK_BYTES
from cluster.wire.ended_requests import EndedUsage
from cluster.wire.fairness_codec import FlowBacklog, WeightedValue, elsewhere_from_pb, put_turn, served_from_pb
from cluster.wire.outbox import CommandBox

log = structlog.get_logger("link")

# Longer prompts travel in chunks on Bulk, so that nothing large stands before a token.
TURN_PROMPT_BYTES = 32_768
MOST_REASON = 2_000
"""Characters of why a worker's engine has ended that are kept."""


class Sink(Protocol):
    """Where one slot's news goes. Called from the link's reader: short, never awaiting. What a method raises is given
    to `failed`, and reaches neither the link nor the other slots."""

    def accepted(self) -> None:
        """The engine has taken the request."""

    def refused(self, reason: str, message: str, field: str) -> None:
        """The engine has not; nothing more comes."""

    heard_at: float
    """When its last token came (monotonic); kept by the link for what goes to `token`, by the sink otherwise."""

    def token(self, token_id: int) -> None:
        """`output` of one token with nothing else, never the first."""

    def output(self, output: TokenOutput) -> None:
        """One step's tokens; with `finish` nothing more comes."""

    def lost(self, why: str) -> None:
        """The link has ended; nothing more comes."""

    def failed(self, error: BaseException) -> None:
        """One of the other methods has raised; the request is aborted, and nothing more comes."""


class LinkStream(NamedTuple):
    """A sequence that a client may resume. `generation`: how often it has; `begun_at`: the gateway that it was resumed
    from, "" where that does not matter."""

    name: str
    generation: int = 0
    begun_at: str = ""


class WorkerLink:
    """One epoch of one worker, as the gateway sees it."""

    def __init__(self, identity: WorkerIdentity, info: EngineInfo, epoch: int) -> None:
        self.identity = identity
        self.info = info
        self.epoch = epoch
        self.likeness = CompatibilityKey(identity.weight_digest, identity.bundle_digest, info.engine_class)
        self.replays = PrefillPacing(info.max_num_batched_tokens)
        """Requests that this gateway has sent and that no step has begun with, as far as is known."""
        self.on_begun: Callable[[bool], None] = lambda continued: None
        """Told that a step has begun with some of these, and whether continued calls were among them."""
        self.load = EngineLoad()
        self.work = ComputedWork()
        """What its engine has computed since its start."""
        self.standing = DrainState.SERVING
        self.leave_at = float("inf")
        """When those that still run there are to go on elsewhere, since it drains (monotonic)."""
        self.liveness: LinkLiveness | None = None
        """Kept by the hub."""
        self.last_heard = time.monotonic()
        self.box = CommandBox()
        self.blobs: asyncio.Queue[pb.Blob] | None = None
        self.on_gaps: Callable[[float, int], None] = lambda gap_s, count: None
        """Told the time between tokens, and of how many tokens it was so long."""
        self.on_usage: Callable[[WorkerLink, Sequence[EndedUsage]], None] = lambda link, usage: None
        """Told what ended requests have come to."""
        self.on_served: Callable[[WorkerLink, Sequence[WeightedValue[ServedTotal]]], None] = lambda link, totals: None
        """Told whom the worker has served."""
        self.on_elsewhere: Callable[[str, Sequence[WeightedValue[FlowBacklog]]], None] = lambda gateway, waiting: None
        """Told who waits for the worker's model at another gateway."""
        self.on_standing: Callable[[], None] = lambda: None
        """Told that the worker takes new work no more, or again."""
        self._step_at = 0.0
        self._purse = CreditBalance()
        self._sinks: dict[int, Sink] = {}
        self._prefilling: dict[int, int] = {}
        self.prefill_tokens = 0
        """Prompt tokens of this gateway's requests there that have no output yet."""
        self._slots = itertools.count(1)
        self.closed = asyncio.Event()
        self.why = ""
        self.reason = "lost"
        """How it ended, in one word: lost is a connection that broke."""
        self.engine_ended = ""
        """Why the worker's engine has ended, once the worker has sent it."""
        self._ended = False

    def __repr__(self) -> str:
        return (
            f"<WorkerLink {self.identity.worker_id} epoch {self.epoch} {self.identity.model} "
            f"running {len(self._sinks)} free {self.free.sequences}>"
        )

    @property
    def name(self) -> str:
        """This link, among all that its gateway has had."""
        return f"{self.identity.worker_id}/{self.identity.incarnation}/{self.epoch}"

    @property
    def leaving(self) -> bool:
        """Whether its worker has said that it drains: its end is no loss."""
        return self.standing in (DrainState.DRAINING, DrainState.DRAINED)

    @property
    def free(self) -> Capacity:
        """Room granted to this gateway and not used; none once the link has ended."""
        return self._purse.free if not self._ended else Capacity(0, 0)

    @property
    def running(self) -> int:
        """Requests of this gateway on this worker."""
        return len(self._sinks)

    def submit(
        self,
        request: EngineRequest,
        sink: Sink,
        attempt: int = 1,
        sealed_record: bytes = b"",
        turn: WeightedValue[Waiting] | None = None,
        earlier_tokens: int = 0,
        fresh_tokens: int = 0,
        stream: LinkStream | None = None,
    ) -> int:
        """Send a request; its slot. The caller has seen room for it in `free`. `sealed_record` comes back with what
        the request has come to, and with `earlier_tokens`, which other workers have generated under that record;
        `turn` says whose it was and what it was charged. Of a continued request `fresh_tokens` are likely to be
        computed, 0 for all. Under the name of `stream` another gateway may go on with it."""
        slot = next(self._slots)
        message = codec.submit_to_pb(slot, attempt, request)  # first: what cannot be encoded takes no room
        if sealed_record:
            message.sealed_record = sealed_record
            message.earlier_tokens = earlier_tokens
        if turn is not None:
            put_turn(message, turn)
        message.fresh_tokens = fresh_tokens
        if stream is not None:
            message.stream, message.generation, message.begun_at = stream.name, stream.generation, stream.begun_at
        tokens = len(request.prompt_token_ids) + len(request.emitted_token_ids)
        expected = tokens - turn.what.cached_tokens if turn is not None else tokens
        blobs = self._prompt_blobs(message)
        # From here on nothing can fail: a request is sent with all that is counted of it, or not at all.
        self._sinks[slot], self._prefilling[slot] = sink, tokens
        self.prefill_tokens += tokens
        self.replays.sent(slot, fresh_tokens or max(expected, 1), bool(request.emitted_token_ids))
        self._purse.spend(tokens)
        if self.blobs is not None:
            for blob in blobs:
                self.blobs.put_nowait(blob)
        self.box.submit(message)
        return slot

    def _prompt_blobs(self, message: pb.Submit) -> Sequence[pb.Blob]:
        """A long prompt's chunks for Bulk, where that is open; the Submit then names them."""
        if len(message.prompt_ids) <= TURN_PROMPT_BYTES or self.blobs is None:
            return ()
        key, data = f"prompt:{message.slot}:{message.attempt}", message.prompt_ids
        message.ClearField("prompt_ids")
        message.prompt_blob = key
        starts = range(0, len(data), CHUNK_BYTES)
        return [pb.Blob(key=key, data=data[at : at + CHUNK_BYTES], last=at + CHUNK_BYTES >= len(data)) for at in starts]

    def fresh(self, tokens: int) -> int:
        """Of so many tokens that this engine has computed before, those it has to compute anew before the next: whole
        KV blocks are found again, but never the last token's."""
        size = max(self.info.block_size, 1)
        return tokens - max(tokens - 1, 0) // size * size

    @property
    def serves(self) -> bool:
        """Whether it takes new work."""
        return self.standing is DrainState.SERVING

    def command(self, command: pb.Command) -> None:
        """Pass on what an operator asks."""
        self.box.command(command)

    def abort(self, slot: int) -> None:
        """Drop a request; its sink hears nothing more. Harmless for one that has ended."""
        if self._sinks.pop(slot, None) is not None:
            self._prefilled(slot)
            self.box.aborts([slot])

    def _prefilled(self, slot: int) -> None:
        """Its prompt stands before nobody any longer."""
        self.prefill_tokens -= self._prefilling.pop(slot, 0)
        self.replays.left(slot)

    def _sink_failed(self, slot: int, sink: Sink, error: BaseException) -> None:
        """End one request whose sink has raised: its failure is not the link's."""
        if not is_call_failure(error):
            raise error
        self.abort(slot)
        try:
            sink.failed(error)
        except Exception:
            log.exception("call_not_ended", worker=self.identity.worker_id, slot=slot)

    @property
    def sinks(self) -> Sequence[Sink]:
        """Whose requests run there."""
        return list(self._sinks.values())

    def close(self, why: str, reason: str = "closed") -> None:
        """End this link from the gateway's side. `reason` is one word, a metric's label."""
        self.why, self.reason = why, reason
        self.closed.set()

    # ---- called by the hub

    def apply(self, message: pb.WorkerTurn) -> bool:
        """Hand a message's frames on; True when credit or standing changed."""
        self.last_heard = time.monotonic()
        for accepted in message.accepted:
            if (sink := self._sinks.get(accepted.slot)) is not None:
                self.replays.accepted(accepted.slot)
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
            before = self.replays.tokens
            if self.replays.step_begins():
                self.on_begun(self.replays.tokens < before)
        if message.HasField("served"):
            self.on_served(self, served_from_pb(message.served))
        for gateway, waiting in elsewhere_from_pb(message.elsewhere):
            self.on_elsewhere(gateway, waiting)
        if message.usage:
            self.on_usage(self, [codec.usage_from_pb(one) for one in message.usage])
        if message.engine_ended:
            self.engine_ended = message.engine_ended[:MOST_REASON]
            self.close("its engine has ended", "lost")
        changed = False
        if message.HasField("load"):
            self.load = codec.load_from_pb(message.load)
        if message.HasField("work"):
            self.work = work_from_pb(message.work)
        if message.HasField("credit"):
            self._purse.granted(message.credit.grant_id, message.credit.sequences, message.credit.tokens)
            self.box.grant_ack(message.credit.grant_id)
            changed = True
        if message.HasField("standing"):
            self.standing = codec.standing_from_pb(message.standing)
            stays_s = message.standing.stay_ms / 1000
            self.leave_at = self.last_heard + stays_s if self.standing is DrainState.DRAINING else float("inf")
            self.on_standing()
            changed = True
        return changed

    def _apply_step(self, step: pb.StepOutputs) -> None:
        sinks = self._sinks
        more = codec.told_more(step)
        if more is not None:
            step_s = self._apply_tokens(step, more)
            if step_s:
                prompts = self._prefilling
                self.replays.took(
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
        """The slots that got one token and nothing else. Most of them got their last one in the step before: then it is
        how long this step took, else 0."""
        now, before = self.last_heard, self._step_at
        self._step_at = now
        find, in_step = self._sinks.get, 0
        for slot, token_id in zip(step.slots, step.token_ids, strict=True):
            if slot in without:
                continue
            sink = find(slot)
            if sink is None:
                continue
            if sink.heard_at == before:
                in_step += 1
            else:
                self.on_gaps(now - sink.heard_at, 1)
            sink.heard_at = now
            try:
                sink.token(token_id)
            except BaseException as error:
                self._sink_failed(slot, sink, error)
        if not in_step:
            return 0.0
        self.on_gaps(now - before, in_step)
        return now - before

    def end(self, why: str) -> None:
        """Tell every slot, once."""
        self._ended = True  # first: whoever is told looks for another place at once
        sinks, self._sinks = self._sinks, {}
        for slot, sink in sinks.items():
            try:
                sink.lost(why)
            except BaseException as error:
                self._sink_failed(slot, sink, error)
