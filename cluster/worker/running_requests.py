"""The requests that run in a worker's engine, from Submit to end, and the capacity that is free for further requests.

The engine's outputs are sent to the requests' links by request_outputs.py. When a link ends, its requests run on for a
moment (detached_requests.py). Meanwhile a Submit with the stream name of such a request, that is, for the same output
of the same call, can take the request over.

RunningRequests never calls the engine. If requests must be aborted in the engine, a method returns their engine request
ids, and its caller aborts them.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import structlog

from cluster.api.outcomes import Outcome
from cluster.api.types import EngineInfo, EngineRequest, TokenOutput
from cluster.link.v1 import link_pb2 as pb
from cluster.wire.credit import Capacity
from cluster.worker.accounts.gpu_meter import GpuMeter, GpuShare
from cluster.worker.accounts.served_reports import ServedReports
from cluster.worker.accounts.usage import WorkerUsage
from cluster.worker.admission_window import AdmissionWindow
from cluster.worker.detached_requests import DetachedRequests
from cluster.worker.link import Link
from cluster.worker.request_outputs import RequestOutputs, RunningRequest
from cluster.worker.resume_generations import call_of

log = structlog.get_logger("worker")


class RunningRequests:
    """All running requests of one worker."""

    def __init__(
        self,
        info: EngineInfo,
        meter: GpuMeter,
        served: ServedReports,
        usage: WorkerUsage,
        is_lost: Callable[[str], bool],
        close_session: Callable[[str], None] = lambda _: None,
        release_adapter: Callable[[str], None] = lambda _: None,
    ) -> None:
        """Create the object without requests.

        `is_lost(incarnation)`: returns whether the gateway with this incarnation has no working link to this worker.
        `close_session`: ends a request's session of the output parser. `release_adapter`: ends a request's use of its
        adapter.
        """
        self._info = info
        self._close_session = close_session
        self._release_adapter = release_adapter
        self._meter = meter
        self._served = served
        self._usage = usage
        self._kv_tokens = info.kv_tokens
        self._window = AdmissionWindow(info.max_num_seqs, info.max_num_batched_tokens)
        self._running: dict[str, RunningRequest] = {}
        self._net_tokens = 0
        """Tokens that all requests so far had when they started, minus the tokens that the ended requests had when they
        ended."""
        self._expected = self._expected_tokens = 0
        self.detached = DetachedRequests()
        self.outputs = RequestOutputs(self._running, self.detached, self._window, meter, served, is_lost, self.forget)
        self.idle = asyncio.Event()
        self.idle.set()

    @property
    def running(self) -> int:
        """Number of running requests that have a link."""
        return len(self._running)

    @property
    def tokens(self) -> int:
        """Number of tokens of all running requests, prompts included."""
        return self._net_tokens + self.outputs.emitted_tokens

    def output_tokens(self) -> Iterator[tuple[str, int]]:
        """Yield each running request's id, with the number of tokens generated for it on all workers."""
        return ((request_id, running.output_tokens) for request_id, running in self._running.items())

    def shares(self) -> Iterator[tuple[GpuShare, int]]:
        """Yield each running request's share of GPU time, with the number of tokens that this worker has generated for
        it."""
        return ((running.share, running.generated) for running in self._running.values())

    def capacity(self) -> tuple[Capacity, int]:
        """Return the capacity free for new calls, and the number of slots free for resumed calls."""
        begins = min(self._window.admissible_sequences, self._window.free_slots - len(self.detached)) - self._expected
        tokens = self._kv_tokens - self.tokens - self._expected_tokens
        return Capacity(begins, tokens), self._window.free_slots - self._expected

    @contextmanager
    def expect(self, tokens: int) -> Iterator[None]:
        """Reserve capacity while the context is open, for a request that waits for its adapter.

        `tokens`: the request's tokens.
        """
        self._expected, self._expected_tokens = self._expected + 1, self._expected_tokens + tokens
        try:
            yield
        finally:
            self._expected, self._expected_tokens = self._expected - 1, self._expected_tokens - tokens

    def count_cached(self, expected: int) -> int:
        """Return how many calls can resume here at almost no cost.

        `expected`: number of calls whose KV blocks a gateway expects on this worker.
        """
        return expected if self.outputs.caches_kv else min(expected, len(self.detached))

    # ---- start of a request

    def new_request(self, link: Link, submit: pb.Submit, request: EngineRequest, received_at: float) -> RunningRequest:
        """Return the record of a new request. The request does not count as running until `reattach` or `start` is
        called.

        `received_at`: monotonic time at which the Submit arrived.
        """
        now = time.monotonic()
        share = self._meter.open_share(now)
        return RunningRequest.from_submit(link, submit, request, share, self._info.block_size, now, received_at)

    def reattach(self, running: RunningRequest, submit: pb.Submit) -> tuple[bool, list[str]]:
        """Let a resumed request take over its detached request, if there is one; send the tokens generated meanwhile.

        Returns whether a detached request was taken over, and the engine request ids to abort. No token is computed
        again.
        """
        if running.token_ids is None:
            return False, []
        earlier = self.detached.claim(running.stream, running.parameters, running.prompt_tokens, running.token_ids)
        if earlier is None:
            return False, self.detached.drop(running.stream)
        request_id, link, ended = earlier.request_id, running.link, earlier.last
        link.requests[running.slot] = request_id
        running.reattach(earlier)
        self._add_running(running, request_id, submit, 0)
        running.accept()
        to_abort: list[str] = []
        missed = earlier.token_ids[running.emitted_tokens :]
        if missed or ended is not None:
            output = TokenOutput(request_id, missed) if ended is None else replace(ended, token_ids=missed)
            to_abort = self.outputs.send_missed(output)
        link.outbox.flush()
        return True, to_abort

    def start(self, running: RunningRequest, request_id: str, submit: pb.Submit) -> list[str]:
        """Add a request that the caller is about to submit to the engine. Returns the engine request ids that the
        caller must abort first.

        The requests to abort are detached requests. Their end makes room in the KV cache and, for a resumed
        request, frees a slot.
        """
        self._add_running(
            running, request_id, submit, running.fresh_tokens if self.outputs.caches_kv else running.tokens
        )
        if not self.detached:
            return []
        goes_on = bool(running.emitted_tokens)
        sequences = len(self._running) + len(self.detached) - self._info.max_num_seqs if goes_on else 0
        return self.detached.make_room(sequences, self.tokens + self.detached.tokens - self._kv_tokens)

    def _add_running(self, running: RunningRequest, request_id: str, submit: pb.Submit, fresh_tokens: int) -> None:
        if not self._running:
            self.idle.clear()
        self._running[request_id] = running
        self._window.record_submit(request_id, fresh_tokens, begins=not running.emitted_tokens)
        self._net_tokens += running.tokens
        self._served.accepted(request_id, running.link.number, submit, running.prompt_tokens)

    def of_call(self, call: str, generation: int) -> list[tuple[Link, int]]:
        """Return the running requests of a call that are older than `generation`, each as link and slot."""
        return [
            (running.link, running.slot)
            for running in self._running.values()
            if running.generation < generation and call_of(running.name) == call
        ]

    # ---- end of a request

    def detach_link(self, link: Link, stays: bool) -> list[str]:
        """Detach the requests of a link that has ended; return the engine request ids to abort.

        `stays`: whether this worker keeps serving. If false, all requests of the link are aborted.
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
            log.info("worker.requests_detached", requests=count, gateway=link.gateway)
        return to_abort

    def forget(self, request_id: str, outcome: Outcome) -> None:
        """Remove a request that has ended.

        Its usage record is kept if the engine accepted the request and its Submit contained a sealed record.
        """
        running = self._running.pop(request_id, None)
        if running is None:
            return
        self._net_tokens -= running.tokens
        self._release_adapter(running.adapter)
        if running.is_parsed:
            self._close_session(request_id)
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
