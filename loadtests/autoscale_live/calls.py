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
"""Replacement character for a character whose last bytes have not arrived."""


@dataclass(slots=True)
class CallResult:
    """Record of one call from the caller's side. Times are in seconds from the beginning of the call; `fault` says why
    the call is incomplete.
    """

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
        """Mean gap between tokens, in seconds."""
        if self.first_s is None or self.planned.tokens < 2:
            return 0.0
        return (self.last_s - self.first_s) / (self.planned.tokens - 1)


def prompt(number: int) -> str:
    """Return one of a few prompts, so that calls with equal prompts can be compared."""
    return f"Tell story number {number}, and take your time."


class Callers:
    """The SDK client and the openai client of one gateway."""

    def __init__(self, grpc: str, http: str) -> None:
        self._sdk = AsyncClient(grpc, timeout_s=TIMEOUT_S)
        self._openai = openai.AsyncOpenAI(
            base_url=f"http://{http}/v1", api_key="none", max_retries=0, timeout=TIMEOUT_S
        )

    async def close(self) -> None:
        """Close both clients."""
        await self._sdk.close()
        await self._openai.close()

    async def call(self, planned: PlannedCall) -> CallResult:
        """Make one call and return the result of the call, whether the call succeeds or fails."""
        result = CallResult(planned, "sdk" if planned.face == 0 else "openai")
        began = time.monotonic()
        try:
            async for text in self._by_sdk(planned, result) if planned.face == 0 else self._by_openai(planned, result):
                now = time.monotonic() - began
                result.first_s = now if result.first_s is None else result.first_s
                result.last_s = now
                result.text += text
        except Exception as error:  # any exception means that the call failed
            result.fault = f"{type(error).__name__}: {error}"
        if not result.fault and result.tokens != planned.tokens:
            result.fault = f"cut: {result.tokens} of {planned.tokens} tokens"
        return result

    async def _by_sdk(self, planned: PlannedCall, result: CallResult) -> AsyncIterator[str]:
        stream = self._sdk.stream_chat(
            MODEL, prompt(planned.prompt), max_tokens=planned.tokens, temperature=0.0, ignore_eos=True
        )
        async with stream:
            async for chunk in stream.chunks():
                if chunk.HasField("progress"):
                    result.progress.append(chunk.progress.state)
                if text := "".join(choice.delta.content for choice in chunk.choices):
                    yield text
        usage = stream.usage
        assert usage is not None, "it comes with the end"
        result.tokens, result.resumed = usage.completion_tokens, usage.resumed

    async def _by_openai(self, planned: PlannedCall, result: CallResult) -> AsyncIterator[str]:
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
                result.tokens = chunk.usage.completion_tokens
            if chunk.choices and chunk.choices[0].delta.content:
                yield chunk.choices[0].delta.content


async def play(
    callers: Callers, plan: Sequence[PlannedCall], over: asyncio.Task[None] | None = None
) -> list[CallResult]:
    """Make every call at its planned time. A call that is not yet due when `over` ends is skipped."""
    began = time.monotonic()

    async def call_when_due(planned: PlannedCall) -> CallResult | None:
        left_s = max(planned.at_s - (time.monotonic() - began), 0.0)
        if over is None:
            await asyncio.sleep(left_s)
        elif (await asyncio.wait((over,), timeout=left_s))[0]:
            return None
        return await callers.call(planned)

    return [result for result in await asyncio.gather(*map(call_when_due, plan)) if result is not None]


def compare(calls: Sequence[CallResult]) -> None:
    """Mark calls whose answers differ from an undisturbed answer to the same prompt. The engine is deterministic, so
    the shorter of two answers must be a prefix of the longer. The last character of the shorter answer may differ, if
    the end of the answer cut this character in two."""
    longest: dict[int, str] = {}
    for call in calls:
        if len(call.text) > len(longest.get(call.planned.prompt, "")):
            longest[call.planned.prompt] = call.text
    for call in calls:
        text, like = call.text.rstrip(CUT), longest[call.planned.prompt]
        if not call.fault and not like.startswith(text):
            same = next(i for i, (a, b) in enumerate(zip(text, like, strict=False)) if a != b)
            what = f"{text[same : same + 40]!r} instead of {like[same : same + 40]!r}"
            where = f"prompt {call.planned.prompt} at {call.planned.at_s:.1f} s by {call.face}, {call.resumed} resumes"
            call.fault = f"differs from an undisturbed call at character {same} of {len(text)}: {what} ({where})"
