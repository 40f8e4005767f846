"""Golden check: run a fixed prompt at start and after every error, and end an engine whose answer becomes wrong.

Problem: an engine on a GPU with a broken memory cell, or with a half-loaded checkpoint, keeps serving nonsense.
`CheckedEngine` wraps an engine. At start it runs a fixed prompt greedily and keeps the answer as the reference.

Some engines can resume a request with the emitted tokens installed as its output (`resume:exact` or `resume:state`).
For such an engine, the wrapper also cuts the answer at a few positions and lets the engine continue it. So a rank that
lacks the resume plugin is detected before the first call arrives. If an engine with `resume:exact` continues with
different tokens (greedy or seeded), its capability becomes `resume:state`.

A second prompt is longer than two KV blocks. It is repeated with its cached blocks beside requests of other lengths,
and cut, too. So kernels that mix up sequences, blocks or states are detected for any architecture.

After the start, every request that ends in ERROR (for example by NaN logits) starts another check while other requests
run. If the answer is wrong, `step` raises EngineCorrupt, which ends the worker like a dead engine.

The golden prompt of a pooling model is a pooling request, whose vector is compared (golden_vectors.py).

An error alone does not end a worker, because a caller can provoke an error. A correct answer need not be bit-identical:
batches differ, and in 16-bit numbers the two most likely tokens may swap. So log probabilities are compared, with a
tolerance for the precision of such numbers. An answer counts as correct unless the comparison proves it wrong.
"""

from __future__ import annotations

import math
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from cluster.api.ports import Engine, EngineCorrupt, EngineRefused
from cluster.api.types import (
    RESUME_EXACT,
    RESUME_STATE,
    EngineInfo,
    EngineLoad,
    EngineRequest,
    FinishReason,
    PositionLogprobs,
    Sampling,
    TokenOutput,
)
from cluster.worker.engine.golden_vectors import golden_pooling, why_vector_wrong

PROMPT_TOKENS = 12
ANSWER_TOKENS = 8
"""Number of tokens in the answer. Prompt and answer are shorter than a KV block, so each answer is computed anew."""
LONG_PROMPT_BLOCKS = 2
MAX_PROMPT_TOKENS = 4096
"""Bound of the long prompt, since the blocks of some hybrid models have thousands of tokens."""
TOPS: tuple[int, ...] = (20, 5, 1, 0)
"""Numbers of log probabilities to request for each position, in the order in which they are tried. The first number
that the engine allows is used."""
PREFIX = "headrace-golden-"
FIRST_PRIORITY = -(1 << 31)
TOLERANCES = {"float32": 0.02, "sim": 0.02}
"""Tolerance of a log probability, by the first part of the engine class."""
TOLERANCE_16_BIT = 0.5
CROWD_TOLERANCE_16_BIT = 1.0
"""Tolerance between an answer and its repetition in another batch: in 16-bit numbers, another batch may choose other
experts."""
EXACT_TOLERANCE = 1e-3
"""Largest difference of a log probability between two batches of an engine with `resume:exact`."""
CUTS = (0.25, 0.5, 0.75)
"""Fractions of the answer at which the answer is cut and continued."""
SEED = 7
"""Seed of the seeded request, which is sampled at temperature 1."""


@dataclass(slots=True)
class GoldenAnswer:
    """The engine's answer to the golden prompt."""

    positions: list[PositionLogprobs] = field(default_factory=list)
    error: str = ""
    refused: bool = False
    vector: bytes = b""
    """Answer of a pooling model."""

    def add(self, output: TokenOutput) -> None:
        """Append an output of the engine to the answer."""
        self.positions += output.logprobs or ()
        self.vector = output.vector or self.vector
        if output.finish is FinishReason.ERROR:
            self.error = output.message or "it ended in an error"

    def tail(self, start: int) -> GoldenAnswer:
        """Return the part of the answer that begins at token `start`."""
        return GoldenAnswer(self.positions[start:])

    @property
    def token_ids(self) -> tuple[int, ...]:
        """Ids of the sampled tokens."""
        return tuple(position.token_ids[0] for position in self.positions)


def why_wrong(reference: GoldenAnswer, answer: GoldenAnswer, tolerance: float) -> str:
    """Return the reason why an answer is wrong; empty if nothing proves that it is wrong.

    An answer is wrong if a token's log probability differs from the reference by more than `tolerance`, or if another
    token is likelier than the sampled token by more than `tolerance`. A token that is not listed among the most likely
    tokens has a log probability of at most the smallest listed value. After the first token that differs from the
    reference, positions are not compared.
    """
    if answer.error:
        return answer.error
    if len(answer.positions) != len(reference.positions):
        return f"{len(answer.positions)} tokens instead of {len(reference.positions)}"
    for at, (expected, actual) in enumerate(zip(reference.positions, answer.positions, strict=True)):
        if reason := _difference(expected, actual, tolerance):
            return f"token {at} {reason}"
        if actual.token_ids[0] != expected.token_ids[0]:
            return ""
    return ""


def _difference(expected: PositionLogprobs, actual: PositionLogprobs, tolerance: float) -> str:
    """Return in words how one position of the answer differs from the reference by more than `tolerance`; "" if it does
    not."""
    sampled, likeliest, value = actual.token_ids[0], expected.token_ids[0], actual.logprobs[0]
    if any(map(math.isnan, actual.logprobs)) or not math.isfinite(value):
        return f"has the log probability {value}"
    if max(actual.logprobs) - value > tolerance:
        return f"is {sampled}, which is not the likeliest"
    for token in dict.fromkeys((sampled, likeliest, *actual.token_ids, *expected.token_ids)):
        (least, most), (lowest, highest) = _bounds(actual, token), _bounds(expected, token)
        if least - highest > tolerance or lowest - most > tolerance:
            if sampled != likeliest:
                return f"is {sampled} instead of {likeliest}"
            difference = f"has the log probability {most:.3f} instead of {highest:.3f}"
            return difference if token == sampled else f"is right, but token id {token} {difference}"
    return ""


def _bounds(position: PositionLogprobs, token: int) -> tuple[float, float]:
    """Return the smallest and the largest log probability that a token can have at a position.

    Both equal the listed value if the position lists the token.
    """
    for candidate, value in zip(position.token_ids, position.logprobs, strict=True):
        if candidate == token:
            return value, value
    return -math.inf, min(position.logprobs[1:] or position.logprobs)


@dataclass(frozen=True, slots=True)
class Golden:
    """One variant of the golden request. `emitted`: tokens that count as already emitted. `seed`: None for greedy."""

    emitted: Sequence[int] = ()
    seed: int | None = None
    prompt_tokens: int = PROMPT_TOKENS


SHORT = Golden()


def long_prompt_tokens(info: EngineInfo) -> int:
    """Return the length of the long prompt: over two KV blocks, or as much as the engine takes."""
    wanted = LONG_PROMPT_BLOCKS * info.block_size + PROMPT_TOKENS
    return max(1, min(wanted, MAX_PROMPT_TOKENS, info.max_model_len - ANSWER_TOKENS))


def golden_request(info: EngineInfo, name: str, golden: Golden = SHORT, top: int = TOPS[0]) -> EngineRequest:
    """Return a golden request. `top`: number of log probabilities per position. The ids of the prompt are from the
    middle of the vocabulary, where every tokenizer has ordinary text."""
    room = max(2, min(golden.prompt_tokens + ANSWER_TOKENS, info.max_model_len))
    length = max(1, room - ANSWER_TOKENS)
    first, span = info.vocab_size // 3, max(1, info.vocab_size // 4)
    return EngineRequest(
        request_id=PREFIX + name,
        prompt_token_ids=[first + i * (span // PROMPT_TOKENS + 1) % span for i in range(length)],
        sampling=Sampling(
            max_tokens=room - length,
            temperature=0.0 if golden.seed is None else 1.0,
            seed=golden.seed,
            ignore_eos=True,
            logprobs=top,
        ),
        emitted_token_ids=golden.emitted,
        cache_salt=PREFIX,
        priority=FIRST_PRIORITY,
        pooling=golden_pooling(info),
    )


class CheckedEngine:
    """An engine (cluster.api.ports) that wraps another engine and checks its answers.

    `node`: the node's name, for errors.
    """

    def __init__(self, engine: Engine, *, node: str = "") -> None:
        self._engine = engine
        self._node = node
        self._info: EngineInfo | None = None
        self._reference = GoldenAnswer()
        self._golden_id = ""  # the id of the golden request in progress
        self._answer = GoldenAnswer()
        self._check_again = False
        self._tops = TOPS
        self.downgrade_reason = ""
        """Reason why the capability `resume:exact` became `resume:state`; empty if it did not."""

    def __repr__(self) -> str:
        return f"CheckedEngine({self._engine!r})"

    async def start(self) -> EngineInfo:
        """Start the wrapped engine, record the reference answer, and check that the engine repeats answers in another
        batch and continues a cut answer correctly.

        Raises EngineCorrupt if the engine refuses the prompt or fails on it, or if an answer is wrong.
        """
        self._info = info = await self._engine.start()
        is_exact = RESUME_EXACT in info.capabilities
        long = Golden(prompt_tokens=long_prompt_tokens(info))
        goldens = [SHORT, long, *([Golden(seed=SEED)] if is_exact else [])]
        wholes = await self._run_golden(goldens)
        self._reference = wholes[0]
        for whole in wholes[:2]:
            self._judge(whole, whole)
        repeated = [long, SHORT, Golden(prompt_tokens=max(1, long.prompt_tokens // 2))]
        cuts = []
        if is_exact or RESUME_STATE in info.capabilities:
            cuts = [
                (golden, whole, cut)
                for golden, whole in zip(goldens, wholes, strict=True)
                for cut in sorted({int(part * len(whole.positions)) for part in CUTS} - {0})
            ]
        resumed = [replace(golden, emitted=whole.token_ids[:cut]) for golden, whole, cut in cuts]
        answers = await self._run_golden([*repeated, *resumed])
        differences = self._crowd_differences((wholes[1], answers[0]), (wholes[0], answers[1]))
        for (golden, whole, cut), rest in zip(cuts, answers[len(repeated) :], strict=True):
            if golden.seed is None:
                self._judge(whole.tail(cut), rest, "continued, ")
            if not rest.refused and rest.token_ids != whole.token_ids[cut:]:
                which = "greedy" if golden.seed is None else "seeded"
                differences.append(f"a {which} request resumed after {cut} tokens continued with different tokens")
        if differences and is_exact:
            self.downgrade_reason = differences[0]
            words = tuple(RESUME_STATE if word == RESUME_EXACT else word for word in info.capabilities)
            self._info = info = replace(info, capabilities=words)
        return info

    def _crowd_differences(self, *pairs: tuple[GoldenAnswer, GoldenAnswer]) -> list[str]:
        """Return in words how answers differ from their repetition in another batch. Raises EngineCorrupt if a
        repetition is wrong."""
        differences = []
        for reference, answer in pairs:
            self._judge(reference, answer, "beside other requests, ", CROWD_TOLERANCE_16_BIT)
            if answer.token_ids != reference.token_ids or why_wrong(reference, answer, EXACT_TOLERANCE):
                differences.append("a greedy request was answered differently beside other requests")
        return differences

    async def _run_golden(self, variants: Sequence[Golden]) -> list[GoldenAnswer]:
        """Run all variants at once; return the answers in the order of the variants."""
        answers, waiting = [], dict[str, GoldenAnswer]()
        for golden in variants:
            answers.append(answer := GoldenAnswer())
            request_id = await self._submit_golden(golden)
            answer.refused = not request_id
            if request_id:
                waiting[request_id] = answer
        while waiting:
            for output in await self._engine.step():
                if output.request_id in waiting:
                    waiting[output.request_id].add(output)
                    if output.finish is not None:
                        del waiting[output.request_id]
        return answers

    async def _submit_golden(self, golden: Golden) -> str:
        """Submit a golden request with as many log probabilities as the engine allows; return the request's id.

        Returns "" if the engine refuses a seeded request, since support of seeds is optional. Raises EngineCorrupt if
        the engine refuses any other golden request.
        """
        assert self._info is not None
        request = golden_request(self._info, uuid.uuid4().hex, golden, self._tops[0])
        try:
            await self._engine.submit(request)
        except EngineRefused as refused:
            if refused.field == "logprobs" and len(self._tops) > 1:
                self._tops = self._tops[1:]
                return await self._submit_golden(golden)
            if golden.seed is not None:
                return ""
            raise self._sick_error(f"it refuses the golden prompt: {refused.message}") from refused
        return request.request_id

    async def _repeat_golden(self) -> None:
        """Submit the golden request with greedy sampling again, while other requests run. A golden request is a fixed
        request whose answer is known."""
        assert self._info is not None
        golden = golden_request(self._info, uuid.uuid4().hex, top=self._tops[0])
        self._answer, self._check_again = GoldenAnswer(), False
        self._golden_id = golden.request_id  # before submit: outputs may arrive before submit returns
        try:
            await self._engine.submit(golden)
        except EngineRefused as refused:
            raise self._sick_error(f"it refuses the golden prompt: {refused.message}") from refused

    async def step(self) -> Sequence[TokenOutput]:
        """Return the next step's outputs, except the outputs of golden requests. Waits until there is at least one
        output to return.

        Raises EngineDead, or its subclass EngineCorrupt if a golden answer is wrong.
        """
        while True:
            golden_id = self._golden_id
            outputs = self._remove_golden_output(await self._engine.step())
            if golden_id and not self._golden_id:
                self._judge(self._reference, self._answer)
            if self._check_again and not self._golden_id:
                await self._repeat_golden()
            if outputs:
                return outputs

    def _remove_golden_output(self, outputs: Sequence[TokenOutput]) -> Sequence[TokenOutput]:
        """Move the output of the golden request from `outputs` to the golden answer. Returns the other outputs. If one
        of them is an error, another check is scheduled."""
        golden_output = None
        for output in outputs:
            if output.request_id == self._golden_id:
                golden_output = output
            elif output.finish is FinishReason.ERROR:
                self._check_again = True
        if golden_output is None:
            return outputs
        self._answer.add(golden_output)
        if golden_output.finish is not None:
            self._golden_id = ""
        return [output for output in outputs if output is not golden_output]

    def _judge(
        self, reference: GoldenAnswer, answer: GoldenAnswer, how: str = "", tolerance_16_bit: float = TOLERANCE_16_BIT
    ) -> None:
        assert self._info is not None
        tolerance = TOLERANCES.get(self._info.engine_class.split("-")[0], tolerance_16_bit)
        reason = why_wrong(reference, answer, tolerance)
        if not reason and self._info.pooling is not None:
            reason = why_vector_wrong(reference.vector, answer.vector, self._info)
        if reason:
            raise self._sick_error(f"{how}its answer to the golden prompt is wrong: {reason}")

    def _sick_error(self, reason: str) -> EngineCorrupt:
        where = f" on node {self._node}" if self._node else ""
        return EngineCorrupt(f"the engine{where} is sick: {reason}")

    async def submit(self, request: EngineRequest) -> None:
        """Submit a request to the wrapped engine."""
        await self._engine.submit(request)

    async def abort(self, request_ids: Sequence[str]) -> None:
        """Abort requests in the wrapped engine."""
        await self._engine.abort(request_ids)

    def load(self) -> EngineLoad:
        """Return the wrapped engine's load, which includes a running golden request."""
        return self._engine.load()

    async def check(self) -> None:
        """Raise EngineDead if the wrapped engine is dead."""
        await self._engine.check()

    async def close(self) -> None:
        """End the wrapped engine."""
        await self._engine.close()
