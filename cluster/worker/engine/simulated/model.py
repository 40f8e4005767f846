"""A continuous-batching scheduler over counted KV blocks: the simulated engine without its clock.

Problem: everything around an engine (queues, credits, routing, resume) must be tested against an engine that fills up,
chunks prefills, shares prefixes and preempts like a real engine, but in microseconds and deterministically.

Invariants: running <= max_num_seqs; a step's tokens <= max_num_batched_tokens; every block is free or held by a running
request; a request's tokens depend only on the request itself (tokens.py).

Source: vLLM's V1 scheduler (running requests first, then the head of the queue while it fits; a preempted request is
computed again) and Sarathi-Serve (Agrawal et al., OSDI 2024) for chunked prefill. Unlike in vLLM, running requests are
served in order of (priority, arrival). So a request is never preempted in a step in which it was already scheduled.
"""

from __future__ import annotations

import dataclasses
import heapq
from bisect import insort
from collections.abc import Sequence
from dataclasses import dataclass

from cluster.api.ports import EngineRefused
from cluster.api.types import EngineLoad, EngineRequest, FinishReason, TokenOutput
from cluster.worker.engine.simulated.config import SimConfig
from cluster.worker.engine.simulated.kv import KvCache
from cluster.worker.engine.simulated.sequence import SimSequence, check_request
from cluster.worker.engine.simulated.tokens import TokenSource


@dataclass(slots=True)
class SimStatistics:
    """Counts since the start, and the current numbers of requests and blocks."""

    steps: int = 0
    submitted: int = 0
    finished: int = 0
    aborted: int = 0
    preemptions: int = 0
    prefill_tokens: int = 0
    decode_tokens: int = 0
    cached_tokens: int = 0
    looked_up_tokens: int = 0
    """Number of tokens that were looked up in the prefix cache. `cached_tokens` of them were found."""
    running: int = 0
    waiting: int = 0
    kv_used_blocks: int = 0
    kv_idle_blocks: int = 0
    most_waiting: int = 0
    """Greatest length of the queue so far, measured after each scheduling of a step."""


@dataclass(frozen=True, slots=True)
class StepPlan:
    """A scheduled step: the number of tokens to compute for each sequence, and the duration of the step."""

    work: Sequence[tuple[SimSequence, int]]
    prefill_tokens: int
    decode_tokens: int
    step_s: float


class SimModel:
    """The simulated engine's scheduler. A step is a call of `schedule`, followed by a call of `complete`."""

    def __init__(self, config: SimConfig) -> None:
        """Create the scheduler. `config` must come from `SimConfig.resolved`, so that all its values are set."""
        self.config = config
        self.kv = KvCache(config.kv_blocks)
        self._source = TokenSource(
            config.token_lo, config.token_hi, config.eos if config.eos >= 0 else None, config.eos_ratio
        )
        self._live: dict[str, SimSequence] = {}
        self._running: list[SimSequence] = []
        self._queue: list[tuple[tuple[int, int], SimSequence]] = []
        self._counts = SimStatistics()
        self._step_s = 0.0
        self._prompt_tokens_left = 0

    # -- requests -------------------------------------------------------------------------------------------------

    def submit(self, request: EngineRequest) -> None:
        """Put a request into the queue. Raises EngineRefused for an invalid request."""
        check_request(request, self.config)
        if request.request_id in self._live:
            raise EngineRefused("INVALID_FIELD", "request_id is already running", "request_id")
        sequence = SimSequence(request, self._counts.submitted, self.config, self.kv)
        self._counts.submitted += 1
        self._live[request.request_id] = sequence
        self._prompt_tokens_left += len(sequence.tokens)
        heapq.heappush(self._queue, (sequence.key, sequence))

    def abort(self, request_id: str) -> bool:
        """Drop a request and free its blocks; return False for an unknown id.

        If the request is in the current step, the step has no output for it.
        """
        sequence = self._live.get(request_id)
        if sequence is None:
            return False
        self._counts.aborted += 1
        self._end(sequence)
        return True

    def has_work(self) -> bool:
        """Return whether any request is running or waiting."""
        return bool(self._live)

    # -- a step ---------------------------------------------------------------------------------------------------

    def schedule(self) -> StepPlan:
        """Plan the next step and allocate its blocks. Call `complete` before the next `schedule`."""
        work: list[tuple[SimSequence, int]] = []
        budget = self.config.max_num_batched_tokens
        preemptions = self._counts.preemptions
        at = 0
        while at < len(self._running) and budget:
            sequence = self._running[at]
            tokens = min(len(sequence.tokens) - sequence.computed, budget)
            if not self._grow_or_preempt(sequence, tokens):
                break
            work.append((sequence, tokens))
            budget -= tokens
            at += 1
        if self._counts.preemptions == preemptions:
            self._admit(work, budget)
        self._counts.most_waiting = max(self._counts.most_waiting, self._waiting)
        return self._plan(work)

    def _admit(self, work: list[tuple[SimSequence, int]], budget: int) -> None:
        while budget and len(self._running) < self.config.max_num_seqs and self._queue:
            sequence = self._queue[0][1]
            if not sequence.alive:
                heapq.heappop(self._queue)
                continue
            sequence.computed = cached = sequence.blocks.acquire_prefix(sequence.tokens)
            tokens = min(len(sequence.tokens) - cached, budget)
            if not sequence.blocks.grow(sequence.tokens, cached + tokens):
                sequence.drop_blocks()
                break
            heapq.heappop(self._queue)
            insort(self._running, sequence, key=_key)
            if sequence.cached_tokens < 0:
                sequence.cached_tokens = min(cached, sequence.output_from)
                self._counts.cached_tokens += sequence.cached_tokens
                self._counts.looked_up_tokens += sequence.output_from
            work.append((sequence, tokens))
            budget -= tokens

    def _plan(self, work: list[tuple[SimSequence, int]]) -> StepPlan:
        decode = sum(1 for sequence, tokens in work if tokens == 1 and sequence.computed + 1 == len(sequence.tokens))
        prefill = sum(tokens for _, tokens in work) - decode
        step_s = self.config.decode_ms / 1000 + prefill / self.config.prefill_tokens_per_s if work else 0.0
        return StepPlan(work, prefill, decode, step_s)

    def complete(self, plan: StepPlan, nan: bool = False, corrupt: bool = False) -> list[TokenOutput]:
        """Finish the planned step and return its outputs.

        If `nan` is true, the first request with an output ends in ERROR. If `corrupt` is true, all tokens are wrong.
        """
        self._counts.steps += 1
        self._step_s = plan.step_s
        self._counts.prefill_tokens += plan.prefill_tokens
        self._counts.decode_tokens += plan.decode_tokens
        outputs: list[TokenOutput] = []
        for sequence, tokens in plan.work:
            if not sequence.alive:
                continue
            sequence.computed += tokens
            if sequence.computed < len(sequence.tokens):
                continue
            if nan:
                nan = False
                output = TokenOutput(sequence.request.request_id, (), FinishReason.ERROR, message="NaN in the logits")
            else:
                output = sequence.emit(self._source, corrupt)
                if output.prompt_tokens is not None:
                    self._prompt_tokens_left -= sequence.submitted_tokens
            if output.finish is not None:
                self._counts.finished += 1
                self._end(sequence)
            outputs.append(output)
        return outputs

    def reaches_max_tokens(self, plan: StepPlan) -> bool:
        """Return whether, in the planned step, some request gets the last token that its max_tokens allows."""
        return any(s.alive and s.computed + n == len(s.tokens) and s.is_last(s.outputs + 1) for s, n in plan.work)

    def _grow_or_preempt(self, sequence: SimSequence, tokens: int) -> bool:
        while not sequence.blocks.grow(sequence.tokens, sequence.computed + tokens):
            victim = self._running.pop()
            self._counts.preemptions += 1
            victim.drop_blocks()
            heapq.heappush(self._queue, (victim.key, victim))
            if victim is sequence:
                return False
        return True

    def _end(self, sequence: SimSequence) -> None:
        sequence.alive = False
        if sequence.first:
            self._prompt_tokens_left -= sequence.submitted_tokens
        if was_running := sequence in self._running:  # first, since other threads call `load`
            self._running.remove(sequence)
        del self._live[sequence.request.request_id]
        sequence.drop_blocks()
        if not was_running and len(self._queue) > 64 and len(self._queue) > 2 * self._waiting:
            self._queue = [entry for entry in self._queue if entry[1].alive]
            heapq.heapify(self._queue)

    # -- load and statistics --------------------------------------------------------------------------------------

    @property
    def _waiting(self) -> int:
        return max(len(self._live) - len(self._running), 0)  # another thread may ask between two changes

    def load(self, busy: str = "", age_s: float = 0.0, p99_s: float = 0.0) -> EngineLoad:
        """Return the current load. Any thread may call this.

        `busy`: the work that explains a long step, or "". `age_s`: age of the current step. `p99_s`: p99 of step
        durations.
        """
        return EngineLoad(
            running=len(self._running),
            waiting=self._waiting,
            kv_usage=self.kv.used / self.kv.blocks,
            steps=self._counts.steps,
            step_s=self._step_s,
            busy=busy,
            step_age_s=age_s,
            step_p99_s=p99_s,
            prefill_tokens=self._prompt_tokens_left,
        )

    def statistics(self) -> SimStatistics:
        """Return counts since the start, and the current numbers of requests and blocks."""
        return dataclasses.replace(
            self._counts,
            running=len(self._running),
            waiting=self._waiting,
            kv_used_blocks=self.kv.used,
            kv_idle_blocks=self.kv.idle,
        )

    def __repr__(self) -> str:
        return f"SimModel({len(self._running)} running, {self._waiting} waiting, {self.kv})"


def _key(sequence: SimSequence) -> tuple[int, int]:
    return sequence.key
