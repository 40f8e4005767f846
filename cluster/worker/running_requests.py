"""What runs at a worker: every request of its engine from the Submit to its end, with all that is counted of it.

The engine's outputs go to the links whose requests they are; those whose link has ended run on for a moment
(detached_requests.py), and a Submit of the same stream takes them over. Nothing here awaits. Engine ids that methods
return are of requests that nobody wants any longer: whoever calls aborts them there.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import replace

import structlog

from cluster.api.outcomes import Outcome
from cluster.api.types import EngineInfo, EngineRequest, FinishReason, TokenOutput
from cluster.link.v1 import link_pb2 as pb
from cluster.wire.credit import Capacity
from cluster.wire.ended_requests import EndedUsage
from cluster.worker.admission_window import AdmissionWindow
from cluster.worker.detached_requests import BROKEN, DetachedRequest, DetachedRequests
from cluster.worker.gpu_meter import GpuMeter, GpuShare
from cluster.worker.resume_generations import ResumeGenerations, call_of
from cluster.worker.served_reports import ServedReports
from cluster.worker.session_state import LinkState, RunningRequest, StepState
from cluster.worker.usage import WorkerUsage

log = structlog.get_logger("worker")

_OUTCOMES = {FinishReason.ERROR: Outcome.INTERNAL, FinishReason.ABORT: Outcome.CANCELLED}


def spent_by(submit: pb.Submit, prompt_ids: bytes) -> tuple[int, bool]:
    """What a Submit takes of its gateway's credit, readable or not: tokens, and whether KV blocks of them are here."""
    tokens = (len(prompt_ids) + len(submit.emitted_ids)) // 4
    return tokens, 0 < submit.fresh_tokens < tokens


class RunningRequests:
    """Of one worker."""

    def __init__(
        self,
        info: EngineInfo,
        meter: GpuMeter,
        served: ServedReports,
        usage: WorkerUsage,
        is_lost: Callable[[str], bool] = lambda incarnation: True,
    ) -> None:
        """`is_lost`: whether there is no working link to the gateway of that incarnation."""
        self._info = info
        self._is_lost = is_lost
        self.takeovers = ResumeGenerations()
        self._meter = meter
        self._served = served
        self._usage = usage
        self._lookahead = AdmissionWindow(info.max_num_seqs, info.max_num_batched_tokens)
        self._running: dict[str, RunningRequest] = {}
        self._joined: dict[str, RunningRequest] = {}
        """Those that were orphans and have had no output since."""
        self._told = StepState()
        """What was told between two steps."""
        self._keeps = True
        """Whether calls that come back have found their KV blocks here lately: not every engine caches."""
        self.orphans = DetachedRequests()
        self.tokens = 0
        """Of all that run, prompts included."""
        self.prefilled_tokens = self.decoded_tokens = 0
        self.idle = asyncio.Event()
        self.idle.set()

    @property
    def running(self) -> int:
        """How many requests run for somebody."""
        return len(self._running)

    def output_tokens(self) -> Iterator[tuple[str, int]]:
        """Requests and the tokens that each has generated."""
        return ((request_id, running.output_tokens) for request_id, running in self._running.items())

    def shares(self) -> Iterator[tuple[GpuShare, int]]:
        """Of the GPUs' time, and the tokens that were generated for them here."""
        return ((running.share, running.generated) for running in self._running.values())

    def room(self) -> tuple[Capacity, int]:
        """What is free for calls that begin, and places for such as go on."""
        begins = min(self._lookahead.sequences, self._lookahead.places - len(self.orphans))
        return Capacity(begins, self._info.kv_tokens - self.tokens), self._lookahead.places

    def kept(self, told: int) -> int:
        """Of so many calls that a gateway believes to be kept here, those that cost next to nothing to go on with."""
        return told if self._keeps else min(told, len(self.orphans))

    # ---- a request comes

    def entered(self, link: LinkState, submit: pb.Submit, request: EngineRequest) -> RunningRequest:
        """What is to be known of it; it is not counted yet."""
        prompt, emitted = len(request.prompt_token_ids), len(request.emitted_token_ids)
        tokens, now = prompt + emitted, time.monotonic()
        running = RunningRequest(
            link,
            submit.slot,
            tokens,
            prompt,
            emitted,
            fresh_tokens=min(submit.fresh_tokens or tokens, tokens),
            sealed=submit.sealed_record,
            earlier_tokens=submit.earlier_tokens,
            share=self._meter.entered(now),
            began=now,
            generation=submit.generation,
            begun_at=submit.begun_at,
            name=submit.stream,
        )
        running.came_home = bool(emitted) and running.fresh_tokens <= self._info.block_size < prompt
        if submit.stream and request.sampling.logprobs is None:
            running.stream, running.token_ids = submit.stream, list(request.emitted_token_ids)
            running.asked = (request.sampling, request.adapter, request.cache_salt, request.priority)
        return running

    def join(self, running: RunningRequest, submit: pb.Submit) -> tuple[bool, list[str]]:
        """Whether it has come back to what still runs for it: then nothing is computed, and what was generated
        meanwhile is told."""
        if running.token_ids is None:
            return False, []
        orphan = self.orphans.claim(running.stream, running.asked, running.prompt_tokens, running.token_ids)
        if orphan is None:
            return False, self.orphans.drop(running.stream)
        request_id, link, ended = orphan.request_id, running.link, orphan.last
        link.requests[running.slot] = request_id
        running.accepted, running.came_home = True, False
        running.cached_tokens = running.tokens if running.emitted_tokens else orphan.cached_tokens
        self._joined[request_id] = running
        self._count(running, request_id, submit, 0)
        link.outbox.accepted(running.slot)
        doomed: list[str] = []
        missed = orphan.token_ids[running.emitted_tokens :]
        if missed or ended is not None:
            output = TokenOutput(request_id, missed) if ended is None else replace(ended, token_ids=missed)
            self._hand_out((output,), self._told)
            doomed = self._end_finished(self._told)
        link.outbox.flush()
        return True, doomed

    def begin(self, running: RunningRequest, request_id: str, submit: pb.Submit) -> list[str]:
        """It goes to the engine. Where the KV cache lacks room for it, or one that goes on a place, those leave for
        which nobody has come."""
        self._count(running, request_id, submit, running.fresh_tokens if self._keeps else running.tokens)
        if not self.orphans:
            return []
        goes_on = bool(running.emitted_tokens)
        sequences = len(self._running) + len(self.orphans) - self._info.max_num_seqs if goes_on else 0
        return self.orphans.make_room(sequences, self.tokens + self.orphans.tokens - self._info.kv_tokens)

    def _count(self, running: RunningRequest, request_id: str, submit: pb.Submit, fresh_tokens: int) -> None:
        self._running[request_id] = running
        self._lookahead.submitted(request_id, fresh_tokens, begins=not running.emitted_tokens)
        self.tokens += running.tokens
        self._served.accepted(request_id, running.link.number, submit, running.prompt_tokens)
        self.idle.clear()

    def take_over(self, call: str, generation: int) -> list[tuple[LinkState, int, str]]:
        """A call was resumed: (link, slot, engine id) of each request of an older generation, which is to end."""
        if not self.takeovers.took_over(call, generation):
            return []
        return [
            (one.link, one.slot, request_id)
            for request_id, one in self._running.items()
            if one.generation < generation and call_of(one.name) == call
        ]

    # ---- a step

    def stepped(self, outputs: Sequence[TokenOutput]) -> tuple[Collection[LinkState], list[str]]:
        """The engine's outputs; the links that have got some, still to be told to send."""
        step, self._told = self._told, StepState()
        told = step.tokens
        self._hand_out(outputs, step)
        self.decoded_tokens += step.tokens - told + step.of_orphans
        if self._meter.gpus:
            self._meter.step(time.monotonic(), step.tokens + step.of_orphans, step.firsts)
        doomed = self._end_finished(step)
        if not self._running:  # what nobody waits for is nobody's time
            self._meter.rested()
        self._lookahead.stepped()
        return step.touched.values(), doomed

    def _hand_out(self, outputs: Sequence[TokenOutput], step: StepState) -> None:
        """Give each link its tokens, and note what was given."""
        emitted = 0
        for output in outputs:
            running = self._running.get(output.request_id)
            if running is None:
                step.of_orphans += self.orphans.output(output)
                continue  # aborted, if it is none of these; one more step may still hold it
            if output.request_id in self._joined:
                output = replace(
                    output,
                    prompt_tokens=running.prompt_tokens,
                    cached_tokens=running.cached_tokens,
                    origin_lost=True,
                )
            elif output.prompt_tokens is not None and running.begun_at:
                output = replace(output, origin_lost=self._is_lost(running.begun_at))
            link = running.link
            link.outbox.output(running.slot, output)
            step.touched[link.number] = link
            count = len(output.token_ids)
            running.tokens += count
            emitted += count
            if running.token_ids is not None:
                running.token_ids += output.token_ids
            if output.prompt_tokens is not None:
                step.firsts.append((running.share, self._began(running, output), count))
            if output.finish is not None:
                running.accepted = True
                step.finished.append((running, output))
        self.tokens += emitted
        step.tokens += emitted

    def _began(self, running: RunningRequest, output: TokenOutput) -> int:
        """Its first output here has come, and is counted; so many tokens were computed for it."""
        running.accepted = True
        running.cached_tokens = output.cached_tokens or 0
        self._lookahead.began(output.request_id)
        if not running.emitted_tokens:  # of a continued one its first worker has told
            self._served.cached(output.request_id, running.cached_tokens)
        if self._joined.pop(output.request_id, None) is not None:
            running.cached_tokens = min(running.cached_tokens, running.prompt_tokens)
            return 0
        if running.came_home:
            self._keeps = 2 * running.cached_tokens >= running.prompt_tokens
        computed = running.prompt_tokens + running.emitted_tokens - running.cached_tokens
        self.prefilled_tokens += computed
        return computed

    # ---- an end

    def _end_finished(self, step: StepState) -> list[str]:
        """Forget those that have ended, once the step is accounted for; their ends can be asked for if a gateway is
        lost with what has just been sent."""
        doomed: list[str] = []
        finished, step.finished = step.finished, []
        for running, output in finished:
            reason = output.finish or FinishReason.STOP
            self.forget(output.request_id, _OUTCOMES.get(reason, Outcome.OK))
            if running.token_ids and reason not in BROKEN:
                doomed += self.orphans.leave(self._orphan(running, output.request_id, output), time.monotonic())
        return doomed

    def leave(self, link: LinkState, stays: bool) -> list[str]:
        """A link has ended, and nobody waits for its requests any longer. `stays`: this worker goes on to serve."""
        elsewhere = {one.stream for one in self._running.values() if one.link is not link}  # has come back already
        doomed, left = [], 0
        for slot, request_id in list(link.requests.items()):
            running = self._running.get(request_id)
            self.forget(request_id, Outcome.CANCELLED)
            lasts = stays and slot not in link.submitting
            if not lasts or running is None or not running.token_ids or running.stream in elsewhere:
                doomed.append(request_id)
            else:
                doomed += self.orphans.leave(self._orphan(running, request_id), time.monotonic())
                left += 1
        if left:
            log.info("orphans", requests=left, gateway=link.gateway)
        return doomed

    @staticmethod
    def _orphan(running: RunningRequest, request_id: str, last: TokenOutput | None = None) -> DetachedRequest:
        ids = running.token_ids or []
        return DetachedRequest(
            running.stream, request_id, running.asked, running.prompt_tokens, ids, running.cached_tokens, last
        )

    def forget(self, request_id: str, outcome: Outcome) -> None:
        """A request has ended; its counts are kept if it was accepted with a record."""
        running = self._running.pop(request_id, None)
        if running is None:
            return
        self.tokens -= running.tokens
        self._joined.pop(request_id, None)
        self._lookahead.ended(request_id)
        self._served.ended(request_id, running.output_tokens)
        running.link.requests.pop(running.slot, None)
        if running.accepted:
            gpu_seconds = self._meter.charge(running.share, running.generated)
            if running.sealed:
                self._keep(running, outcome, gpu_seconds)
        if not self._running:
            self._meter.rested()
            self.idle.set()

    def _keep(self, running: RunningRequest, outcome: Outcome, gpu_seconds: float) -> None:
        usage = EndedUsage(
            running.sealed,
            prompt_tokens=running.prompt_tokens,
            cached_tokens=running.cached_tokens,
            generated_tokens=running.generated,
            written_tokens=running.generated,
            earlier_tokens=running.earlier_tokens,
            gpu_seconds=gpu_seconds,
            gpu=self._usage.gpu,
            outcome=outcome.value,
            duration_s=time.monotonic() - running.began,
        )
        self._usage.keep(usage, running.link.number, running.slot)

    def __repr__(self) -> str:
        return f"WorkerCalls({len(self._running)} running, {len(self.orphans)} orphans, {self.tokens} tokens)"
