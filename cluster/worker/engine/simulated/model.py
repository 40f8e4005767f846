"""A continuous-batching scheduler over counted KV blocks: the simulated engine without its clock.

Problem: everything around an engine (queues, credits, routing, resume) must be tested against an engine that fills up,
chunks prefills, shares prefixes and preempts like a real engine, but in microseconds and deterministically. Invariants:
running <= max_num_seqs; a step's tokens <= max_num_batched_tokens; every block is free or held by a running request; a
request's tokens depend only on the request itself (tokens.py). Source: vLLM's V1 scheduler (running requests first,
then the head of the queue while it fits; recompute after preemption) and Sarathi-Serve (Agrawal et al., OSDI 2024) for
chunked prefill. Unlike in vLLM, running requests are served in order of (priority, arrival), so that a preempted
request was never scheduled in the same step.
"""

from __future__ import annotations

import heapq
from bisect import insort
from collections.abc import Sequence
from dataclasses import dataclass

from cluster.api.ports import EngineRefused
from cluster.api.types import EngineLoad, EngineRequest, FinishReason, TokenOutput
from cluster.worker.engine.simulated.config import SimConfig
from cluster.worker.engine.simulated.kv import KvCache, chain
from cluster.worker.engine.simulated.tokens import TokenSource, content_key, digest64, extend, fold

MAX_LOGPROBS = 20


@dataclass(frozen=True, slots=True)
class SimStatistics:
    """Counts since the start, and the current numbers of requests and blocks."""

    steps: int
    submitted: int
    finished: int
    aborted: int
    preemptions: int
    prefill_tokens: int
    decode_tokens: int
    cached_tokens: int
    running: int
    waiting: int
    kv_used_blocks: int
    kv_idle_blocks: int
    most_waiting: int = 0
    """Greatest length of the queue directly after a step was scheduled."""


@dataclass(frozen=True, slots=True)
class StepPlan:
    """A scheduled step: the number of tokens to compute for each sequence, and the duration of the step."""

    work: Sequence[tuple[SimSequence, int]]
    prefill_tokens: int
    decode_tokens: int
    step_s: float


@dataclass(frozen=True, slots=True)
class StepResult:
    """A step that was computed at once. Its outputs are due at `ends_at`."""

    ends_at: float
    outputs: Sequence[TokenOutput]


class SimSequence:
    """A request in the engine: the tokens so far and the blocks that the request holds."""

    __slots__ = (
        "alive", "blocks", "cached_tokens", "computed", "content", "first", "held", "key", "logprobs", "output_from",
        "private", "request", "root", "state", "stops", "tokens",
    )  # fmt: skip

    def __init__(self, request: EngineRequest, arrival: int, config: SimConfig) -> None:
        sampling = request.sampling
        self.request = request
        self.key = (request.priority, arrival)
        self.tokens = [*request.prompt_token_ids, *request.emitted_token_ids]
        self.output_from = len(request.prompt_token_ids)
        self.content = content_key(config.seed, request, bool(config.salted))
        self.state = fold(self.content, self.tokens)
        self.root = digest64(request.cache_salt, request.adapter)
        self.blocks: list[int] = []  # hashes of all full blocks known so far
        self.held = 0  # number of leading `blocks` that the sequence holds in the cache
        self.private = 0
        self.computed = 0
        self.cached_tokens = -1  # -1 until the sequence is first scheduled
        self.first = True
        self.alive = True
        self.logprobs = sampling.logprobs
        self.stops = _stops(request, config)

    @property
    def outputs(self) -> int:
        """Number of tokens emitted so far, including the tokens of earlier attempts."""
        return len(self.tokens) - self.output_from

    def __repr__(self) -> str:
        return f"SimSequence({self.request.request_id}: {self.computed}/{len(self.tokens)})"


class SimModel:
    """The simulated engine's scheduler. `schedule` and then `complete` make one step; `step` calls both."""

    def __init__(self, config: SimConfig) -> None:
        """Create the scheduler. `config` must be resolved: vocabulary, token range and max_model_len are known."""
        self.config = config
        self.kv = KvCache(config.kv_blocks)
        self._source = TokenSource(
            config.token_lo, config.token_hi, config.eos if config.eos >= 0 else None, config.eos_ratio
        )
        self._live: dict[str, SimSequence] = {}
        self._running: list[SimSequence] = []
        self._queue: list[tuple[tuple[int, int], SimSequence]] = []
        self._arrivals = 0
        self._steps = self._finished = self._aborted = self._preemptions = 0
        self._prefill_tokens = self._decode_tokens = self._cached_tokens = 0
        self._most_waiting = 0
        self._step_s = 0.0
        self._prompt_tokens_left = 0
        self.corrupt = False

    # -- requests -------------------------------------------------------------------------------------------------

    def submit(self, request: EngineRequest) -> None:
        """Put a request into the queue. Raises EngineRefused for an invalid request."""
        self._check_request(request)
        sequence = SimSequence(request, self._arrivals, self.config)
        self._arrivals += 1
        self._live[request.request_id] = sequence
        self._prompt_tokens_left += len(sequence.tokens)
        heapq.heappush(self._queue, (sequence.key, sequence))

    def _check_request(self, request: EngineRequest) -> None:
        c, s = self.config, request.sampling
        length = len(request.prompt_token_ids) + len(request.emitted_token_ids)
        if length >= c.max_model_len:
            raise EngineRefused(
                "CONTEXT_LENGTH_EXCEEDED",
                f"the prompt has {length} tokens, but the context is {c.max_model_len} tokens, at least one for output",
                "prompt_token_ids",
            )
        wrong = (
            (request.request_id in self._live, "request_id", "is already running"),
            (not request.prompt_token_ids, "prompt_token_ids", "must not be empty"),
            (s.max_tokens < 1, "max_tokens", "must be 1 or more"),
            (s.min_tokens > s.max_tokens, "min_tokens", "must not exceed max_tokens"),
            (len(request.emitted_token_ids) >= s.max_tokens, "emitted_token_ids", "reach max_tokens already"),
            (not _stops(request, c).isdisjoint(request.emitted_token_ids), "emitted_token_ids", "have a stop token"),
            (
                s.logprobs is not None and not 0 <= s.logprobs <= MAX_LOGPROBS,
                "logprobs",
                f"must be 0 to {MAX_LOGPROBS}",
            ),
        )
        for is_wrong, name, what in wrong:
            if is_wrong:
                raise EngineRefused("INVALID_FIELD", f"{name} {what}", name)
        for name, ids in (
            ("prompt_token_ids", request.prompt_token_ids),
            ("emitted_token_ids", request.emitted_token_ids),
        ):
            if ids and (max(ids) >= c.vocab or min(ids) < 0):
                raise EngineRefused(
                    "INVALID_FIELD", f"{name} has ids outside the vocabulary (0 to {c.vocab - 1})", name
                )

    def abort(self, request_id: str) -> bool:
        """Drop a request and free its blocks; return False for an unknown id.

        The current step then has no output for the request.
        """
        sequence = self._live.get(request_id)
        if sequence is None:
            return False
        self._aborted += 1
        self._end(sequence)
        return True

    def has_work(self) -> bool:
        """Return whether any request is running or waiting, so that a step has work."""
        return bool(self._live)

    # -- a step ---------------------------------------------------------------------------------------------------

    def step(self, now: float) -> StepResult:
        """Run one whole step from `now` on, for simulations in which nothing happens within a step."""
        plan = self.schedule()
        return StepResult(now + plan.step_s, self.complete(plan))

    def schedule(self) -> StepPlan:
        """Plan the next step and allocate its blocks. Call `complete` before the next `schedule`."""
        work: list[tuple[SimSequence, int]] = []
        budget = self.config.max_num_batched_tokens
        preemptions = self._preemptions
        at = 0
        while at < len(self._running) and budget:
            sequence = self._running[at]
            tokens = min(len(sequence.tokens) - sequence.computed, budget)
            if not self._grow_or_preempt(sequence, tokens):
                break
            work.append((sequence, tokens))
            budget -= tokens
            at += 1
        if self._preemptions == preemptions:
            self._admit(work, budget)
        self._most_waiting = max(self._most_waiting, self._waiting)
        return self._plan(work)

    def _admit(self, work: list[tuple[SimSequence, int]], budget: int) -> None:
        while budget and len(self._running) < self.config.max_num_seqs and self._queue:
            sequence = self._queue[0][1]
            if not sequence.alive:
                heapq.heappop(self._queue)
                continue
            cached = self._acquire_prefix(sequence)
            tokens = min(len(sequence.tokens) - cached, budget)
            if not self._grow(sequence, tokens):
                self._drop_blocks(sequence)
                break
            heapq.heappop(self._queue)
            insort(self._running, sequence, key=_key)
            if sequence.cached_tokens < 0:
                sequence.cached_tokens = min(cached, sequence.output_from)
                self._cached_tokens += sequence.cached_tokens
            work.append((sequence, tokens))
            budget -= tokens

    def _plan(self, work: list[tuple[SimSequence, int]]) -> StepPlan:
        decode = sum(1 for sequence, tokens in work if tokens == 1 and sequence.computed + 1 == len(sequence.tokens))
        prefill = sum(tokens for _, tokens in work) - decode
        step_s = self.config.decode_ms / 1000 + prefill / self.config.prefill_tokens_per_s if work else 0.0
        return StepPlan(work, prefill, decode, step_s)

    def complete(self, plan: StepPlan, nan: bool = False) -> list[TokenOutput]:
        """Finish the planned step and return its outputs.

        If `nan` is true, the first request with an output ends in ERROR.
        """
        self._steps += 1
        self._step_s = plan.step_s
        self._prefill_tokens += plan.prefill_tokens
        self._decode_tokens += plan.decode_tokens
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
                output = self._emit(sequence)
            if output.finish is not None:
                self._finished += 1
                self._end(sequence)
            outputs.append(output)
        return outputs

    def reaches_max_tokens(self, plan: StepPlan) -> bool:
        """Return whether the planned step gives some request its last allowed token."""
        return any(
            s.alive and s.computed + n == len(s.tokens) and s.outputs + 1 == s.request.sampling.max_tokens
            for s, n in plan.work
        )

    def _emit(self, sequence: SimSequence) -> TokenOutput:
        sampling = sequence.request.sampling
        token = self._source.draw(
            sequence.state,
            may_end=sequence.outputs >= sampling.min_tokens,
            ignore_eos=sampling.ignore_eos,
            forbidden=sequence.stops,
        )
        if self.corrupt:
            token = self._source.different(token)
        output = TokenOutput(sequence.request.request_id, (token,))
        if sequence.logprobs is not None:
            greedy = sampling.temperature == 0
            output.logprobs = [self._source.logprobs(sequence.state, token, sequence.logprobs, greedy)]
        if sequence.first:
            self._finish_prompt(sequence)
            output.prompt_tokens, output.cached_tokens = sequence.output_from, sequence.cached_tokens
        sequence.tokens.append(token)
        sequence.state = extend(sequence.state, token)
        if token in sequence.stops:
            output.finish = FinishReason.STOP
            if sampling.ignore_eos or token != self.config.eos:
                output.stop_token_id = token
        elif sequence.outputs >= sampling.max_tokens or len(sequence.tokens) >= self.config.max_model_len:
            output.finish = FinishReason.LENGTH
        return output

    def _finish_prompt(self, sequence: SimSequence) -> None:
        """Subtract the sequence's prompt from the remaining prefill work. Idempotent."""
        if sequence.first:
            sequence.first = False
            self._prompt_tokens_left -= sequence.output_from + len(sequence.request.emitted_token_ids)

    # -- blocks ---------------------------------------------------------------------------------------------------

    def _acquire_prefix(self, sequence: SimSequence) -> int:
        """Hold the leading cached blocks; return the number of tokens in these blocks.

        The last token is always computed, because its logits are needed.
        """
        size = self.config.block_size
        self._hash_blocks(sequence, len(sequence.tokens))
        cached = self.kv.match(sequence.blocks[: (len(sequence.tokens) - 1) // size])
        self.kv.acquire(sequence.blocks[:cached])
        sequence.held = cached
        sequence.computed = cached * size
        return sequence.computed

    def _hash_blocks(self, sequence: SimSequence, tokens: int) -> None:
        size, blocks = self.config.block_size, sequence.blocks
        for at in range(len(blocks), tokens // size):
            parent = blocks[-1] if blocks else sequence.root
            blocks.append(chain(parent, sequence.tokens[at * size : (at + 1) * size]))

    def _grow(self, sequence: SimSequence, tokens: int) -> bool:
        """Allocate blocks for `tokens` more tokens and share the blocks that become full.

        Returns False and changes nothing if there are too few blocks.
        """
        size = self.config.block_size
        end = sequence.computed + tokens
        missing = -(-end // size) - sequence.held - sequence.private
        if missing > 0:
            if not self.kv.allocate(missing):
                return False
            sequence.private += missing
        full = end // size
        if full > sequence.held:
            self._hash_blocks(sequence, end)
            for block in sequence.blocks[sequence.held : full]:
                self.kv.commit(block)
            sequence.private -= full - sequence.held
            sequence.held = full
        return True

    def _grow_or_preempt(self, sequence: SimSequence, tokens: int) -> bool:
        while not self._grow(sequence, tokens):
            victim = self._running.pop()
            self._preemptions += 1
            self._drop_blocks(victim)
            heapq.heappush(self._queue, (victim.key, victim))
            if victim is sequence:
                return False
        return True

    def _drop_blocks(self, sequence: SimSequence) -> None:
        self.kv.release(sequence.blocks[: sequence.held], sequence.private)
        sequence.held = sequence.private = sequence.computed = 0

    def _end(self, sequence: SimSequence) -> None:
        sequence.alive = False
        self._finish_prompt(sequence)
        del self._live[sequence.request.request_id]
        self._drop_blocks(sequence)
        if sequence in self._running:
            self._running.remove(sequence)
        elif len(self._queue) > 64 and len(self._queue) > 2 * self._waiting:
            self._queue = [entry for entry in self._queue if entry[1].alive]
            heapq.heapify(self._queue)

    # -- load and statistics --------------------------------------------------------------------------------------

    @property
    def _waiting(self) -> int:
        return len(self._live) - len(self._running)

    def load(self, busy: str = "", age_s: float = 0.0, p99_s: float = 0.0) -> EngineLoad:
        """Return the current load. `busy`, `age_s` and `p99_s` describe the current step, known only to SimEngine."""
        return EngineLoad(
            running=len(self._running),
            waiting=self._waiting,
            kv_usage=self.kv.used / self.kv.blocks,
            steps=self._steps,
            step_s=self._step_s,
            busy=busy,
            step_age_s=age_s,
            step_p99_s=p99_s,
            prefill_tokens=self._prompt_tokens_left,
        )

    def statistics(self) -> SimStatistics:
        """Return counts since the start, and the current numbers of requests and blocks."""
        return SimStatistics(
            steps=self._steps,
            submitted=self._arrivals,
            finished=self._finished,
            aborted=self._aborted,
            preemptions=self._preemptions,
            prefill_tokens=self._prefill_tokens,
            decode_tokens=self._decode_tokens,
            cached_tokens=self._cached_tokens,
            running=len(self._running),
            waiting=self._waiting,
            kv_used_blocks=self.kv.used,
            kv_idle_blocks=self.kv.idle,
            most_waiting=self._most_waiting,
        )

    def __repr__(self) -> str:
        return f"SimModel({len(self._running)} running, {self._waiting} waiting, {self.kv})"


def _stops(request: EngineRequest, config: SimConfig) -> frozenset[int]:
    eos = () if request.sampling.ignore_eos or config.eos < 0 else (config.eos,)
    return frozenset((*request.sampling.stop_token_ids, *eos))


def _key(sequence: SimSequence) -> tuple[int, int]:
    return sequence.key
