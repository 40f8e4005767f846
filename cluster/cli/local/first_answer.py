"""The first call of a demo: a question to a model, or a request for the vectors or the ranking of three texts."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence

from cluster.api.pooling import PoolingTask, pooling_tasks
from cluster.cli.local.children import StartFailed
from cluster.cli.local.step_lines import StepLine
from cluster.client import AsyncClient, HeadraceError

FIRST_QUESTION = "What is the capital of France?"
FIRST_TEXTS = ("A cat sleeps on the mat.", "The kitten is napping on the rug.", "Interest rates rose in May.")
FIRST_QUERY = "What do cats do?"
TIMEOUT_S = 120


async def served_tasks(endpoint: str, model: str) -> Sequence[PoolingTask]:
    """Return the pooling tasks of a model. The result is empty if the model generates text, or if the gateway returns
    an error. `endpoint`: host:port of a gateway's gRPC API."""
    async with AsyncClient(endpoint, timeout_s=TIMEOUT_S) as client:
        try:
            return pooling_tasks((await client.model(model)).capabilities)
        except HeadraceError:
            return ()


async def first_answer(endpoint: str, model: str, step: StepLine) -> None:
    """Send a first call to a model and show the answer, with the speed of the model. Raises StartFailed."""
    tasks = await served_tasks(endpoint, model)
    step.show(f"asking {model}")
    call = _vectors if PoolingTask.EMBED in tasks else _ranking if PoolingTask.SCORE in tasks else _text
    async with AsyncClient(endpoint, timeout_s=TIMEOUT_S) as client:
        try:
            answer = await call(client, model)
        except HeadraceError as error:
            raise StartFailed(f"the first call failed: {error}") from None
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    step.done(f"{answer} · {cores} CPU cores")


async def _text(client: AsyncClient, model: str) -> str:
    """Send FIRST_QUESTION to the model. Return a line with the answer, the time to the first token and the speed.
    Raises HeadraceError."""
    stream = client.stream_chat(model, FIRST_QUESTION, temperature=0.0, max_tokens=64)
    began = time.monotonic()
    first_s = 0.0
    async for _ in stream:
        first_s = first_s or time.monotonic() - began
    tokens = stream.usage.completion_tokens if stream.usage else 0
    rate = f" · {(tokens - 1) / (time.monotonic() - began - first_s):.0f} tokens/s" if tokens > 1 else ""
    answer = " ".join(stream.text.split())
    return f'"{answer}"   first token {first_s * 1000:.0f} ms{rate}'


async def _vectors(client: AsyncClient, model: str) -> str:
    """Embed FIRST_TEXTS, and describe how similar the first text is to each other text. Raises HeadraceError."""
    began = time.monotonic()
    vectors = list(await client.embed(model, list(FIRST_TEXTS)))
    took_s = time.monotonic() - began
    near, far = (sum(a * b for a, b in zip(vectors[0], other, strict=True)) for other in vectors[1:])
    return (
        f'"{FIRST_TEXTS[0]}" is {near:.2f} like "{FIRST_TEXTS[1]}" and {far:.2f} like "{FIRST_TEXTS[2]}"   '
        f"{len(vectors)} vectors of {len(vectors[0])} numbers in {took_s * 1000:.0f} ms"
    )


async def _ranking(client: AsyncClient, model: str) -> str:
    """Rank FIRST_TEXTS by their relevance to FIRST_QUERY, and describe the result. Raises HeadraceError."""
    began = time.monotonic()
    best = next(iter(await client.rerank(model, FIRST_QUERY, list(FIRST_TEXTS))))
    took_s = time.monotonic() - began
    return f'"{FIRST_QUERY}": "{FIRST_TEXTS[best.index]}"   {len(FIRST_TEXTS)} scores in {took_s * 1000:.0f} ms'
