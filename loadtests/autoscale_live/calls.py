"""Callers of a live run (the SDK and the stock openai client) and the results of their calls."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field

import openai

from cluster.client import AsyncClient
from loadtests.autoscale_live.traffic import PlannedCall

MODEL = "sim"
TIMEOUT_S = 600.0
CUT = "\N{REPLACEMENT CHARACTER}"
"""Replacement for a character of which only the first bytes have arrived."""


@dataclass(slots=True)
class Told:
    """One call as its caller saw it. Times in seconds from its beginning; `fault` says why it is incomplete."""

    planned: PlannedCall
    face: str
    first_s: float | None = None
    last_s: float = 0.0
    text: str = ""
    tokens: int = 0
    resumed: int = 0
    fault: str = ""
    progress: list[str] = field(default_factory=list)

    @property
    def mean_gap_s(self) -> float:
        """Mean gap between tokens."""
        if self.first_s is None or self.planned.tokens < 2:
            return 0.0
        return (self.last_s - self.first_s) / (self.planned.tokens - 1)


def prompt(number: int) -> str:
    """One of a few prompts, so that calls with equal prompts can be compared."""
    return f"Tell story number {number}, and take your time."


class Callers:
    """Both clients of one gateway."""

    def __init__(self, grpc: str, http: str) -> None:
        self._sdk = AsyncClient(grpc, timeout_s=TIMEOUT_S)
        self._openai = openai.AsyncOpenAI(
            base_url=f"http://{http}/v1", api_key="none", max_retries=0, timeout=TIMEOUT_S
        )

    async def close(self) -> None:
        """Close both clients."""
        await self._sdk.close()
        await self._openai.close()

    async def call(self, planned: PlannedCall) -> Told:
        """Make one call and return its result, whether it succeeds or fails."""
        told = Told(planned, "sdk" if planned.face == 0 else "openai")
        began = time.monotonic()
        try:
            async for text in self._by_sdk(planned, told) if planned.face == 0 else self._by_openai(planned, told):
                now = time.monotonic() - began
                told.first_s = now if told.first_s is None else told.first_s
                told.last_s = now
                told.text += text
        except Exception as error:  # any exception means that this call failed
            told.fault = f"{type(error).__name__}: {error}"
        if not told.fault and told.tokens != planned.tokens:
            told.fault = f"cut: {told.tokens} of {planned.tokens} tokens"
        return told

    async def _by_sdk(self, planned: PlannedCall, told: Told) -> AsyncIterator[str]:
        stream = self._sdk.stream_chat(
            MODEL, prompt(planned.prompt), max_tokens=planned.tokens, temperature=0.0, ignore_eos=True
        )
        async with stream:
            async for chunk in stream.chunks():
                if chunk.HasField("progress"):
                    told.progress.append(chunk.progress.state)
                if text := "".join(choice.delta.content for choice in chunk.choices):
                    yield text
        usage = stream.usage
        assert usage is not None, "it comes with the end"
        told.tokens, told.resumed = usage.completion_tokens, usage.resumed

    async def _by_openai(self, planned: PlannedCall, told: Told) -> AsyncIterator[str]:
        stream = await self._openai.chat.completions.create(
            model=MODEL,
            messages=[{"role": "user", "content": prompt(planned.prompt)}],
            max_tokens=planned.tokens,
            temperature=0.0,
            stream=True,
            stream_options={"include_usage": True},
            extra_body={"ignore_eos": True},
        )
        async for chunk in stream:
            if chunk.usage is not None:
                told.tokens = chunk.usage.completion_tokens
            if chunk.choices and chunk.choices[0].delta.content:
                yield chunk.choices[0].delta.content


async def play(callers: Callers, plan: Sequence[PlannedCall], over: asyncio.Task[None] | None = None) -> list[Told]:
    """Make every call at its time; calls that are not yet due when `over` ends are skipped."""
    began = time.monotonic()

    async def one(planned: PlannedCall) -> Told | None:
        left_s = max(planned.at_s - (time.monotonic() - began), 0.0)
        if over is None:
            await asyncio.sleep(left_s)
        elif (await asyncio.wait((over,), timeout=left_s))[0]:
            return None
        return await callers.call(planned)

    return [told for told in await asyncio.gather(*map(one, plan)) if told is not None]


def compare(calls: Sequence[Told]) -> None:
    """Mark calls that differ from an undisturbed call with the same prompt. The engine is deterministic: of two answers
    the shorter is a prefix of the longer, except for a last character that its end may have cut in two.
    """
    longest: dict[int, str] = {}
    for one in calls:
        if len(one.text) > len(longest.get(one.planned.prompt, "")):
            longest[one.planned.prompt] = one.text
    for one in calls:
        text, like = one.text.rstrip(CUT), longest[one.planned.prompt]
        if not one.fault and not like.startswith(text):
            same = next(i for i, (a, b) in enumerate(zip(text, like, strict=False)) if a != b)
            what = f"{text[same : same + 40]!r} instead of {like[same : same + 40]!r}"
            where = (
                f"prompt {one.planned.prompt} at {one.planned.at_s:.1f} s by {one.face}, {one.resumed} times resumed"
            )
            one.fault = f"other text than its like from character {same} of {len(text)} on: {what} ({where})"
