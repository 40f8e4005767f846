"""The table of the requests that run on one link, keyed by slot (the request's number on the link). Each
request has a sink, the object that receives its events. The table also lists the prompts that the engine
has not computed yet.

When a link ends, for whatever reason, `lost` is called once on each sink, and no later message of the
link is applied. Slots are not reused within a link.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from typing import NamedTuple, Protocol

import structlog

from cluster.api.output_parts import OutputPart
from cluster.api.types import TokenOutput
from cluster.gateway.links.prefill_pacing import PrefillPacing
from cluster.link.v1 import link_pb2 as pb
from cluster.process.call_errors import is_call_failure
from cluster.wire.codecs import codec

log = structlog.get_logger("link")


class Sink(Protocol):
    """The receiver of the events of one request.

    The task that reads the link calls the methods, which must be short and must not block. An exception from a method
    is passed to `failed`, and affects neither the link nor the other requests.
    """

    def accepted(self) -> None:
        """Handle that the engine has accepted the request."""

    def refused(self, reason: str, message: str, field: str) -> None:
        """Handle a refusal of the request by the engine. No further method is called."""

    last_token_at: float
    """Monotonic time of the last token, which the sink records in `token` and `output`."""

    def token(self, token_id: int, now: float) -> None:
        """Handle an output that consists of one token only. This is a fast path of `output`. Never called for the first
        token. `now`: the monotonic time at which the token arrived."""

    def parsed_token(self, token_id: int, parts: Sequence[OutputPart], now: float) -> None:
        """Handle an output that consists of one token and the parts (such as content or reasoning) that the worker's
        parser made of it. This is a fast path of `output`. Never called for the first token. `now`: the monotonic time
        at which the token arrived."""

    def output(self, output: TokenOutput) -> None:
        """Handle the tokens of one step. If the output has `finish`, no further method is called."""

    def lost(self, why: str) -> None:
        """Handle the end of the link. No further method is called."""

    def failed(self, error: BaseException) -> None:
        """Handle an exception that another method of this sink has raised. The request has been aborted, and no further
        method is called."""


MAX_SAMPLES = 64
"""Number of prefill samples that are kept until they are read."""


class PrefillSample(NamedTuple):
    """A measurement of prefill: the engine took `seconds` for `tokens` prompt tokens. `at`: monotonic time of the
    measurement."""

    tokens: int
    seconds: float
    at: float


class _Prompt(NamedTuple):
    """A prompt that has no output yet. `to_compute`: number of its tokens that the engine is likely to compute.
    `sent_at`: monotonic time. `holds_output`: whether the engine is expected to hold emitted tokens too, which its
    count of cached tokens leaves out."""

    tokens: int
    to_compute: int
    sent_at: float
    holds_output: bool = False

    def computed(self, cached_tokens: int) -> int:
        """Return how many tokens the engine has computed. `cached_tokens`: its count of cached prompt tokens."""
        return self.to_compute if self.holds_output else max(self.tokens - cached_tokens, 1)


class SlotTable:
    """The requests that run on one link. A request is in the table from its submission to its end. Its prompt counts as
    waiting for prefill until its first output."""

    def __init__(
        self,
        worker_id: str,
        pacing: PrefillPacing,
        send_aborts: Callable[[Sequence[int]], None],
        count_gaps: Callable[[float, int], None],
    ) -> None:
        """`send_aborts`: sends the slots of aborted requests to the worker. `count_gaps`: records a gap between tokens;
        its arguments are the gap in seconds and the number of tokens that arrived after the gap."""
        self._worker_id = worker_id
        self._pacing = pacing
        self._send_aborts = send_aborts
        self._count_gaps = count_gaps
        self._sinks: dict[int, Sink] = {}
        self._prefilling: dict[int, _Prompt] = {}
        self.prefill_tokens = 0
        """Number of tokens that the engine is likely to compute for the requests that have no output yet."""
        self._step_at = 0.0
        self._first_at = 0.0
        self._samples: deque[PrefillSample] = deque(maxlen=MAX_SAMPLES)
        self.strays = 0
        """Number of outputs that arrived for slots without a request."""

    def __len__(self) -> int:
        return len(self._sinks)

    @property
    def sinks(self) -> Sequence[Sink]:
        """Sinks of all requests."""
        return list(self._sinks.values())

    @property
    def unanswered(self) -> int:
        """Number of requests that have no output yet."""
        return len(self._prefilling)

    def add(
        self,
        slot: int,
        sink: Sink,
        tokens: int,
        paced: int,
        resumed: bool,
        to_compute: int = 0,
        now: float = 0.0,
        *,
        holds_output: bool = False,
    ) -> None:
        """Add a request that is being sent.

        `sink`: receives the request's outputs. `tokens`: number of tokens of the prompt and the emitted tokens.
        `resumed`: whether the request resumes a sequence. `paced`: number of tokens that count toward the
        worker's limit on resumed prompts in one step (prefill pacing). `to_compute`: number of tokens that the
        engine is likely to compute; 0 means as many as `paced`. `now`: monotonic time. `holds_output`: whether the
        engine is expected to hold emitted tokens in its cache.
        """
        prompt = _Prompt(tokens, to_compute or paced, now, holds_output)
        self._sinks[slot], self._prefilling[slot] = sink, prompt
        self.prefill_tokens += prompt.to_compute
        self._pacing.add(slot, paced, resumed)

    def pop_prefill_samples(self) -> Sequence[PrefillSample]:
        """Remove and return the prefill samples that were recorded since the last call."""
        samples = list(self._samples)
        self._samples.clear()
        return samples

    def unfinished(self, now: float) -> PrefillSample:
        """Return a sample for the requests without output: the number of prompt tokens that the engine is likely to
        compute, and the seconds for which the engine has worked on them so far."""
        since = next((prompt.sent_at for prompt in self._prefilling.values()), now)
        return PrefillSample(self.prefill_tokens, max(now - max(since, self._first_at), 0.0), now)

    def replace_sink(self, slot: int, sink: Sink) -> None:
        """Deliver the further events of a slot to another sink. Does nothing if the request has ended."""
        if slot in self._sinks:
            self._sinks[slot] = sink

    def abort(self, slot: int) -> None:
        """Abort the request in a slot. No further method of the request's sink is called. Does nothing if the request
        has ended."""
        if self._sinks.pop(slot, None) is not None:
            self._prefilled(slot)
            self._send_aborts([slot])

    def accept(self, slot: int) -> None:
        """Record that the engine has accepted a request, and call `accepted` on its sink."""
        if (sink := self._sinks.get(slot)) is not None:
            self._pacing.mark_accepted(slot)
            try:
                sink.accepted()
            except BaseException as error:
                self._sink_failed(slot, sink, error)

    def refuse(self, refused: pb.Refused) -> None:
        """Remove a request that the engine has refused, and call `refused` on its sink."""
        if (sink := self._sinks.pop(refused.slot, None)) is not None:
            self._prefilled(refused.slot)
            try:
                sink.refused(refused.reason, refused.message, refused.field)
            except BaseException as error:
                self._sink_failed(refused.slot, sink, error)

    def lose(self, why: str) -> None:
        """Remove all requests because the link has ended, and call `lost` once on each sink."""
        sinks, self._sinks = self._sinks, {}
        for slot, sink in sinks.items():
            try:
                sink.lost(why)
            except BaseException as error:
                self._sink_failed(slot, sink, error)

    def _prefilled(self, slot: int) -> None:
        """Stop counting the prompt in a slot as waiting for prefill."""
        if (prompt := self._prefilling.pop(slot, None)) is not None:
            self.prefill_tokens -= prompt.to_compute
        self._pacing.remove(slot)

    def _sink_failed(self, slot: int, sink: Sink, error: BaseException) -> None:
        """Abort a request whose sink has raised an exception, and call `failed` on the sink. The link continues."""
        if not is_call_failure(error):
            raise error
        self.abort(slot)
        try:
            sink.failed(error)
        except Exception:
            log.exception("link.request_not_ended", worker=self._worker_id, slot=slot)

    def apply_step(self, step: pb.StepOutputs, now: float) -> None:
        """Deliver the outputs of one engine step, which arrived at the monotonic time `now`."""
        sinks = self._sinks
        if step.firsts:
            self._record_prefill(step.firsts, now)
        more = codec.slots_with_details(step)
        parts = codec.parts_by_slot(step) if step.part_slots else {}
        if more is not None:
            step_s = self._apply_tokens(step, more, parts, now)
            if step_s:
                prompts = self._prefilling
                self._pacing.record_step(
                    step_s,
                    sum(
                        prompt.computed(first.cached_tokens)
                        for first in step.firsts
                        if (prompt := prompts.get(first.slot)) is not None
                    ),
                )
            if not more:
                return
        for slot, output in codec.outputs_from_pb(step, more, parts):
            sink = sinks.get(slot)
            if sink is None:
                self.strays += 1
                continue
            if slot in self._prefilling:
                self._prefilled(slot)
            if output.finish is not None:
                del sinks[slot]
            try:
                sink.output(output)
            except BaseException as error:
                self._sink_failed(slot, sink, error)

    def _record_prefill(self, firsts: Iterable[pb.First], now: float) -> None:
        """Record how long the engine has taken for the prompts whose first output has just arrived.

        The engine computes prompts in the order of their arrival. So the time begins when these prompts were
        sent, or at the first output of the previous prompts, if that was later.
        """
        computed, since = 0, math.inf
        for first in firsts:
            if (prompt := self._prefilling.get(first.slot)) is not None:
                computed += prompt.computed(first.cached_tokens)
                since = min(since, prompt.sent_at)
        if computed:
            self._samples.append(PrefillSample(computed, max(now - max(since, self._first_at), 0.0), now))
            self._first_at = now

    def _apply_tokens(
        self, step: pb.StepOutputs, without: Container[int], parts: Mapping[int, Sequence[OutputPart]], now: float
    ) -> float:
        """Deliver one token to each slot that got exactly one token in this step. `without`: slots to skip. `parts`:
        the parsed parts of a slot's token, for slots whose output the worker parses.

        Returns the time since the previous step in seconds; 0 if no slot got a token in both steps.
        """
        before, self._step_at = self._step_at, now
        sink_of, in_step = self._sinks.get, 0
        for slot, token_id in zip(step.slots, step.token_ids, strict=True):
            if slot in without:
                continue
            sink = sink_of(slot)
            if sink is None:
                self.strays += 1
                continue
            if sink.last_token_at == before:
                in_step += 1
            else:
                self._count_gaps(now - sink.last_token_at, 1)
            try:
                if parts and (made := parts.get(slot)) is not None:
                    sink.parsed_token(token_id, made, now)
                else:
                    sink.token(token_id, now)
            except BaseException as error:
                self._sink_failed(slot, sink, error)
        if not in_step:
            return 0.0
        self._count_gaps(now - before, in_step)
        return now - before
