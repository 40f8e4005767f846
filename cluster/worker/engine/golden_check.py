"""A sick engine is taken out: it is asked a golden prompt at start and after every error, and must answer as at first.

Problem: a GPU with a broken memory cell, or a half-loaded checkpoint, goes on serving and answers nonsense.
`Examined` is an engine around an engine. At start it asks a fixed prompt, greedily, and keeps the answer; where the
engine says that it takes emitted tokens as output, it also asks for the rest of that answer behind a few cuts, so that
a rank without the plugin is found before a call is. An engine that says `resume:exact` must give the very tokens there,
and those of a seeded call too: where it does not, it is well, and its word becomes `resume:state`. From then on any
request that ends in ERROR (NaN logits do so) makes it ask again, beside the running requests. A wrong answer raises
EngineSick from `step`, which ends the worker as a dead engine does.

An error alone takes nobody out: a caller can provoke one. And a right answer need not be equal to the last bit:
batches differ, and in 16-bit numbers the likeliest token may change places with its neighbour. So log probabilities
are compared, within what such numbers are worth. An answer that this cannot decide proves nothing.
"""

from __future__ import annotations

import math
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from cluster.api.ports import Engine, EngineRefused, EngineSick
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

PROMPT_TOKENS = 12
ANSWER_TOKENS = 8
"""Together shorter than a block of the KV cache: the answer is computed anew each time."""
TOPS: tuple[int, ...] = (20, 5, 1, 0)
"""Log probabilities asked for a position: the first number that the engine's max_logprobs allows."""
PREFIX = "headrace-golden-"
FIRST_PRIORITY = -(1 << 31)
TOLERANCES = {"float32": 0.02, "sim": 0.02}
"""Of a log probability, by the first word of the engine class."""
TOLERANCE_16_BIT = 0.5
CUTS = (0.25, 0.5, 0.75)
"""Parts of the answer after which it is cut and continued."""
SEED = 7
"""Of the seeded call, which is drawn at temperature 1."""


@dataclass(slots=True)
class GoldenAnswer:
    """What came for the golden prompt."""

    positions: list[PositionLogprobs] = field(default_factory=list)
    error: str = ""
    refused: bool = False

    def add(self, output: TokenOutput) -> None:
        """The next output."""
        self.positions += output.logprobs or ()
        if output.finish is FinishReason.ERROR:
            self.error = output.message or "it ended in an error"

    def tail(self, start: int) -> GoldenAnswer:
        """The answer without its first tokens."""
        return GoldenAnswer(self.positions[start:])

    @property
    def token_ids(self) -> tuple[int, ...]:
        """The sampled tokens."""
        return tuple(position.token_ids[0] for position in self.positions)


def why_wrong(reference: GoldenAnswer, answer: GoldenAnswer, tolerance: float) -> str:
    """Return what proves an answer wrong; empty when nothing does.

    A healthy engine gives each token a log probability within `tolerance` of the reference. An answer is wrong when no
    such values explain both. A token outside a list of the likeliest has an unknown value, at most the list's smallest:
    it proves something only where that bound does. After two tokens that differ the texts differ, and prove nothing.
    """
    if answer.error:
        return answer.error
    if len(answer.positions) != len(reference.positions):
        return f"{len(answer.positions)} tokens instead of {len(reference.positions)}"
    for at, (right, found) in enumerate(zip(reference.positions, answer.positions, strict=True)):
        if reason := _why_apart(right, found, tolerance):
            return f"token {at} {reason}"
        if found.token_ids[0] != right.token_ids[0]:
            return ""
    return ""


def _why_apart(right: PositionLogprobs, found: PositionLogprobs, tolerance: float) -> str:
    """Return what in one position's values no noise within `tolerance` explains; empty when all of it can be noise."""
    sampled, likeliest, value = found.token_ids[0], right.token_ids[0], found.logprobs[0]
    if any(map(math.isnan, found.logprobs)) or not math.isfinite(value):
        return f"has the log probability {value}"
    if max(found.logprobs) - value > tolerance:
        return f"is {sampled}, which is not the likeliest"
    for token in dict.fromkeys((sampled, likeliest, *found.token_ids, *right.token_ids)):
        (least, most), (lowest, highest) = _bounds(found, token), _bounds(right, token)
        if least - highest > tolerance or lowest - most > tolerance:
            if sampled != likeliest:
                return f"is {sampled} instead of {likeliest}"
            told = f"has the log probability {most:.3f} instead of {highest:.3f}"
            return told if token == sampled else f"is right, but token id {token} {told}"
    return ""


def _bounds(position: PositionLogprobs, token: int) -> tuple[float, float]:
    """Return the smallest and largest log probability that a token can have by the values of one position."""
    for candidate, value in zip(position.token_ids, position.logprobs, strict=True):
        if candidate == token:
            return value, value
    return -math.inf, min(position.logprobs[1:] or position.logprobs)


def golden_request(
    info: EngineInfo, name: str, emitted: Sequence[int] = (), top: int = TOPS[0], seed: int | None = None
) -> EngineRequest:
    """The prompt: ids from the middle of the vocabulary, where every tokenizer has ordinary text. Greedy, or drawn with
    `seed`."""
    room = max(2, min(PROMPT_TOKENS + ANSWER_TOKENS, info.max_model_len))
    prompt = [info.vocab_size // 3 + i * info.vocab_size // (4 * PROMPT_TOKENS) for i in range(PROMPT_TOKENS)]
    length = max(1, room - ANSWER_TOKENS)
    return EngineRequest(
        request_id=PREFIX + name,
        prompt_token_ids=prompt[:length],
        sampling=Sampling(
            max_tokens=room - length,
            temperature=0.0 if seed is None else 1.0,
            seed=seed,
            ignore_eos=True,
            logprobs=top,
        ),
        emitted_token_ids=emitted,
        cache_salt=PREFIX,
        priority=FIRST_PRIORITY,
    )


class Examined:
    """An engine (cluster.api.ports) around one that is asked whether it is well. `node` is named when it is not."""

    def __init__(self, engine: Engine, *, node: str = "") -> None:
        self._engine = engine
        self._node = node
        self._info: EngineInfo | None = None
        self._reference = GoldenAnswer()
        self._asked = ""  # the id of the question under way
        self._answer = GoldenAnswer()
        self._ask_again = False
        self._tops = TOPS
        self.withdrawn = ""
        """Reason for which the engine's word `resume:exact` became `resume:state`; empty where it did not."""

    def __repr__(self) -> str:
        return f"Examined({self._engine!r})"

    async def start(self) -> EngineInfo:
        """Start and record the reference. Raises EngineSick when there is none, or when its rest is not its rest."""
        self._info = info = await self._engine.start()
        continues = not {RESUME_EXACT, RESUME_STATE}.isdisjoint(info.capabilities)
        seeds = [SEED] if RESUME_EXACT in info.capabilities else []
        self._reference, *seeded = await self._asked_together([((), seed) for seed in (None, *seeds)])
        self._judge(self._reference, self._reference)
        if continues:
            apart = await self._apart_when_cut([(self._reference, None), *zip(seeded, seeds, strict=True)])
            if apart and RESUME_EXACT in info.capabilities:
                self.withdrawn = apart
                words = tuple(RESUME_STATE if word == RESUME_EXACT else word for word in info.capabilities)
                self._info = info = replace(info, capabilities=words)
        return info

    async def _apart_when_cut(self, wholes: Sequence[tuple[GoldenAnswer, int | None]]) -> str:
        """Return where the rest of an answer (with its seed), asked for behind a cut, has other tokens; empty where all
        have the same, or are refused. Raises EngineSick for a greedy rest that is wrong."""
        cuts = [
            (whole, seed, cut)
            for whole, seed in wholes
            for cut in sorted({int(part * len(whole.positions)) for part in CUTS} - {0})
        ]
        rests = await self._asked_together([(whole.token_ids[:cut], seed) for whole, seed, cut in cuts])
        apart = []
        for (whole, seed, cut), rest in zip(cuts, rests, strict=True):
            if seed is None:
                self._judge(whole.tail(cut), rest, "continued, ")
            if not rest.refused and rest.token_ids != whole.token_ids[cut:]:
                which = "greedy" if seed is None else "seeded"
                apart.append(f"a {which} call that was cut after {cut} tokens went on with others")
        return next(iter(apart), "")

    async def _asked_together(self, questions: Sequence[tuple[Sequence[int], int | None]]) -> list[GoldenAnswer]:
        """Return what comes for the golden prompt with these emitted tokens, drawn with these seeds."""
        answers, waiting = [], dict[str, GoldenAnswer]()
        for emitted, seed in questions:
            answers.append(answer := GoldenAnswer())
            request_id = await self._submitted(emitted, seed)
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

    async def _submitted(self, emitted: Sequence[int], seed: int | None) -> str:
        """Hand a question over, with as many log probabilities as the engine gives. Its id; empty where the engine
        refuses a seeded one: it may take no seeds, or not go on with them. Raises EngineSick."""
        assert self._info is not None
        question = golden_request(self._info, uuid.uuid4().hex, emitted, self._tops[0], seed)
        try:
            await self._engine.submit(question)
        except EngineRefused as refused:
            if refused.field == "logprobs" and len(self._tops) > 1:
                self._tops = self._tops[1:]
                return await self._submitted(emitted, seed)
            if seed is not None:
                return ""
            raise self._sick(f"it refuses the golden prompt: {refused.message}") from refused
        return question.request_id

    async def _ask(self) -> None:
        """Ask the greedy question again, beside calls."""
        assert self._info is not None
        question = golden_request(self._info, uuid.uuid4().hex, (), self._tops[0])
        self._answer, self._ask_again = GoldenAnswer(), False
        self._asked = question.request_id  # before submit: outputs may come while that returns
        try:
            await self._engine.submit(question)
        except EngineRefused as refused:
            raise self._sick(f"it refuses the golden prompt: {refused.message}") from refused

    async def step(self) -> Sequence[TokenOutput]:
        """The next step with outputs for callers. Raises EngineDead, EngineSick among them."""
        while True:
            asked = self._asked
            outputs = self._take(await self._engine.step())
            if asked and not self._asked:
                self._judge(self._reference, self._answer)
            if self._ask_again and not self._asked:
                await self._ask()
            if outputs:
                return outputs

    def _take(self, outputs: Sequence[TokenOutput]) -> Sequence[TokenOutput]:
        """Keep what answers the golden prompt, and note errors; the outputs of others."""
        mine = None
        for output in outputs:
            if output.request_id == self._asked:
                mine = output
            elif output.finish is FinishReason.ERROR:
                self._ask_again = True
        if mine is None:
            return outputs
        self._answer.add(mine)
        if mine.finish is not None:
            self._asked = ""
        return [output for output in outputs if output is not mine]

    def _judge(self, reference: GoldenAnswer, answer: GoldenAnswer, how: str = "") -> None:
        assert self._info is not None
        tolerance = TOLERANCES.get(self._info.engine_class.split("-")[0], TOLERANCE_16_BIT)
        if reason := why_wrong(reference, answer, tolerance):
            raise self._sick(f"{how}its answer to the golden prompt is wrong: {reason}")

    def _sick(self, reason: str) -> EngineSick:
        where = f" on node {self._node}" if self._node else ""
        return EngineSick(f"the engine{where} is sick: {reason}")

    async def submit(self, request: EngineRequest) -> None:
        """Hand a request over."""
        await self._engine.submit(request)

    async def abort(self, request_ids: Sequence[str]) -> None:
        """Drop requests."""
        await self._engine.abort(request_ids)

    def load(self) -> EngineLoad:
        """What the engine does, the golden prompt included."""
        return self._engine.load()

    async def check(self) -> None:
        """Raise EngineDead if it is."""
        await self._engine.check()

    async def close(self) -> None:
        """End it."""
        await self._engine.close()
