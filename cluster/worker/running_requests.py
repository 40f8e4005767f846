"""The requests that run in a worker's engine, from Submit to end, and everything counted about them.

Outputs of the engine go to the link of their request. A request whose link has ended runs on for a moment
(detached_requests.py); a Submit of the same stream takes the request over. No method awaits. Methods return the engine
request ids that the caller must abort.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace

import structlog

from cluster.api.outcomes import Outcome
from cluster.api.types import EngineInfo, EngineRequest, FinishReason, TokenOutput
from cluster.link.v1 import link_pb2 as pb
from cluster.wire.credit import Capacity
from cluster.worker.admission_window import AdmissionWindow
from cluster.worker.detached_requests import FAILED, DetachedRequests
from cluster.worker.gpu_meter import GpuMeter, GpuShare
from cluster.worker.link import Link
from cluster.worker.resume_generations import call_of
from cluster.worker.running_request import RunningRequest
from cluster.worker.served_reports import ServedReports
from cluster.worker.usage import WorkerUsage

log = structlog.get_logger("worker")

_OUTCOMES = {FinishReason.ERROR: Outcome.INTERNAL, FinishReason.ABORT: Outcome.CANCELLED}


@dataclass(slots=True)
class StepState:
    """The outputs that one step has sent to links, or that were sent between two steps."""

    touched: dict[int, Link] = field(default_factory=dict)
    firsts: list[tuple[GpuShare, int, int]] = field(default_factory=list)
    """Share, computed tokens and emitted tokens of each request with its first output."""
    finished: list[tuple[RunningRequest, TokenOutput]] = field(default_factory=list)
    tokens: int = 0
    detached_tokens: int = 0
    """Number of tokens generated for detached requests."""


class RunningRequests:
    """All running requests of one worker."""

    def __init__(
        self,
        info: EngineInfo,
        meter: GpuMeter,
        served: ServedReports,
        usage: WorkerUsage,
        is_lost: Callable[[str], bool],
    ) -> None:
        """Create an empty set. `is_lost`: whether no working link leads to the gateway with the given incarnation."""
        self._info = info
        self._is_lost = is_lost
        self._meter = meter
        self._served = served
        self._usage = usage
        self._window = AdmissionWindow(info.max_num_seqs, info.max_num_batched_tokens)
        self._running: dict[str, RunningRequest] = {}
        self._pending_step = StepState()
        """Outputs sent since the last step."""
        self._caches_kv = True
        """Whether resumed calls have lately found their KV blocks here. Not every engine caches them."""
        self.detached = DetachedRequests()
        self.tokens = 0
        """Tokens of all running requests, prompts included."""
        self.prefilled_tokens = self.decoded_tokens = 0
        self.idle = asyncio.Event()
        self.idle.set()

    @property
    def running(self) -> int:
        """Number of requests that run for a link."""
        return len(self._running)

    def output_tokens(self) -> Iterator[tuple[str, int]]:
        """Yield each request id with the number of tokens generated for the request on all workers."""
        return ((request_id, running.output_tokens) for request_id, running in self._running.items())

    def shares(self) -> Iterator[tuple[GpuShare, int]]:
        """Yield each request's share of GPU time and the number of tokens generated for the request on this worker."""
        return ((running.share, running.generated) for running in self._running.values())

    def capacity(self) -> tuple[Capacity, int]:
        """Return the capacity free for new calls, and the number of slots free for resumed calls."""
        begins = min(self._window.admissible_sequences, self._window.free_slots - len(self.detached))
        return Capacity(begins, self._info.kv_tokens - self.tokens), self._window.free_slots

    def count_cached(self, expected: int) -> int:
        """Return how many of a gateway's `expected` cached calls this worker can resume at almost no cost."""
        return expected if self._caches_kv else min(expected, len(self.detached))

    # ---- start of a request

    def new_request(self, link: Link, submit: pb.Submit, request: EngineRequest) -> RunningRequest:
        """Return the record of a new request. The request is counted once `reattach` or `start` gets the record."""
        now = time.monotonic()
        share = self._meter.open_share(now)
        return RunningRequest.from_submit(link, submit, request, share, self._info.block_size, now)

    def reattach(self, running: RunningRequest, submit: pb.Submit) -> tuple[bool, list[str]]:
        """Reattach a resumed request to its detached request, if there is one, and send the tokens generated meanwhile.

        Nothing is computed again. Return whether the request was reattached, and the engine request ids to abort.
        """
        if running.token_ids is None:
            return False, []
        earlier = self.detached.claim(running.stream, running.parameters, running.prompt_tokens, running.token_ids)
        if earlier is None:
            return False, self.detached.drop(running.stream)
        request_id, link, ended = earlier.request_id, running.link, earlier.last
        link.requests[running.slot] = request_id
        running.reattached, running.expects_cache = True, False
        running.cached_tokens = running.tokens if running.emitted_tokens else earlier.cached_tokens
        self._add_running(running, request_id, submit, 0)
        running.accept()
        to_abort: list[str] = []
        missed = earlier.token_ids[running.emitted_tokens :]
        if missed or ended is not None:
            output = TokenOutput(request_id, missed) if ended is None else replace(ended, token_ids=missed)
            self._send_outputs((output,), self._pending_step)
            to_abort = self._forget_finished(self._pending_step)
        link.outbox.flush()
        return True, to_abort

    def start(self, running: RunningRequest, request_id: str, submit: pb.Submit) -> list[str]:
        """Count a request that goes to the engine, and drop the detached requests that are in its way.

        Detached requests are dropped if the KV cache lacks space for the new request, or if a resumed request lacks a
        slot.
        """
        self._add_running(running, request_id, submit, running.fresh_tokens if self._caches_kv else running.tokens)
        if not self.detached:
            return []
        goes_on = bool(running.emitted_tokens)
        sequences = len(self._running) + len(self.detached) - self._info.max_num_seqs if goes_on else 0
        return self.detached.make_room(sequences, self.tokens + self.detached.tokens - self._info.kv_tokens)

    def _add_running(self, running: RunningRequest, request_id: str, submit: pb.Submit, fresh_tokens: int) -> None:
        if not self._running:
            self.idle.clear()
        self._running[request_id] = running
        self._window.record_submit(request_id, fresh_tokens, begins=not running.emitted_tokens)
        self.tokens += running.tokens
        self._served.accepted(request_id, running.link.number, submit, running.prompt_tokens)

    def of_call(self, call: str, generation: int) -> list[tuple[Link, int]]:
        """Return link and slot of each request of a call that has an older generation than `generation`."""
        return [
            (running.link, running.slot)
            for running in self._running.values()
            if running.generation < generation and call_of(running.name) == call
        ]

    # ---- step

    def apply_step(self, outputs: Sequence[TokenOutput]) -> tuple[Collection[Link], list[str]]:
        """Apply a step's outputs; return the links that the caller must flush and the engine request ids to abort."""
        step, self._pending_step = self._pending_step, StepState()
        already_sent = step.tokens
        self._send_outputs(outputs, step)
        self.decoded_tokens += step.tokens - already_sent + step.detached_tokens
        if self._meter.gpus:
            self._meter.step(time.monotonic(), step.tokens + step.detached_tokens, step.firsts)
        to_abort = self._forget_finished(step)
        if not self._running:  # time spent on detached requests alone is charged to no request
            self._meter.mark_idle()
        self._window.record_step()
        return step.touched.values(), to_abort

    def _send_outputs(self, outputs: Sequence[TokenOutput], step: StepState) -> None:
        """Put each output into its link's outbox and record it in `step`."""
        emitted = 0
        for output in outputs:
            running = self._running.get(output.request_id)
            if running is None:
                step.detached_tokens += self.detached.output(output)
                continue  # detached, or aborted: one more step may still contain an aborted request
            if running.reattached:
                output = replace(
                    output,
                    prompt_tokens=running.prompt_tokens,
                    cached_tokens=running.cached_tokens,
                    origin_lost=True,
                )
            elif output.prompt_tokens is not None and running.resumed_from:
                output = replace(output, origin_lost=self._is_lost(running.resumed_from))
            link = running.link
            link.outbox.output(running.slot, output)
            step.touched[link.number] = link
            count = len(output.token_ids)
            running.tokens += count
            emitted += count
            if running.token_ids is not None:
                running.token_ids += output.token_ids
            if output.prompt_tokens is not None:
                step.firsts.append((running.share, self._record_first_output(running, output), count))
            if output.finish is not None:
                running.accepted = True
                step.finished.append((running, output))
        self.tokens += emitted
        step.tokens += emitted

    def _record_first_output(self, running: RunningRequest, output: TokenOutput) -> int:
        """Record a request's first output on this worker; return the number of tokens computed for the request."""
        running.accepted = True
        running.cached_tokens = output.cached_tokens or 0
        self._window.record_first_output(output.request_id)
        if not running.emitted_tokens:  # the first worker has reported the cached tokens of a resumed request
            self._served.cached(output.request_id, running.cached_tokens)
        if running.reattached:
            running.reattached = False
            running.cached_tokens = min(running.cached_tokens, running.prompt_tokens)
            return 0
        if running.expects_cache:
            self._caches_kv = 2 * running.cached_tokens >= running.prompt_tokens
        computed = running.prompt_tokens + running.emitted_tokens - running.cached_tokens
        self.prefilled_tokens += computed
        return computed

    # ---- end of a request

    def _forget_finished(self, step: StepState) -> list[str]:
        """Forget finished requests, once the step is accounted for; return the engine request ids to abort.

        The requests stay resumable for a moment as detached requests, since a gateway may be lost before it delivers
        the last output.
        """
        to_abort: list[str] = []
        finished, step.finished = step.finished, []
        for running, output in finished:
            reason = output.finish or FinishReason.STOP
            self.forget(output.request_id, _OUTCOMES.get(reason, Outcome.OK))
            if running.token_ids and reason not in FAILED:
                to_abort += self.detached.add(running.as_detached(output.request_id, output), time.monotonic())
        return to_abort

    def detach_link(self, link: Link, stays: bool) -> list[str]:
        """Detach the requests of a link that has ended; return the engine request ids to abort.

        `stays`: whether this worker keeps serving. If it does not, no request is detached.
        """
        resumed = {running.stream for running in self._running.values() if running.link is not link}
        to_abort, count = [], 0
        for slot, request_id in list(link.requests.items()):
            running = self._running.get(request_id)
            self.forget(request_id, Outcome.CANCELLED)
            lasts = stays and not link.is_submitting(slot)
            if not lasts or running is None or not running.token_ids or running.stream in resumed:
                to_abort.append(request_id)
            else:
                to_abort += self.detached.add(running.as_detached(request_id), time.monotonic())
                count += 1
        if count:
            log.info("requests_detached", requests=count, gateway=link.gateway)
        return to_abort

    def forget(self, request_id: str, outcome: Outcome) -> None:
        """Remove an ended request.

        Its usage is kept if the engine accepted the request and the Submit had a sealed record.
        """
        running = self._running.pop(request_id, None)
        if running is None:
            return
        self.tokens -= running.tokens
        self._window.record_end(request_id)
        self._served.ended(request_id, running.output_tokens)
        running.link.requests.pop(running.slot, None)
        if running.accepted:
            gpu_seconds = self._meter.charge(running.share, running.generated)
            if running.sealed:
                usage = running.ended_usage(outcome, gpu_seconds, self._usage.gpu, time.monotonic())
                self._usage.keep(usage, running.link.number, running.slot)
        if not self._running:
            self._meter.mark_idle()
            self.idle.set()
