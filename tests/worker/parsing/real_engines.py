"""Real engines with the tokenizer of the parser tests, and the parts of their answers."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

from cluster.api.types import EngineRequest
from cluster.worker.engine.vllm.engine import VllmEngine
from cluster.worker.parsing.output_parser import OutputParser
from tests.worker.engine.conftest import TOKEN_HI, TOKEN_LO, tiny_spec
from tests.worker.engine.contract import Answer, Driver, Subject
from tests.worker.parsing.test_output_parser import collect, parts_of


@contextlib.asynccontextmanager
async def started(checkpoint: Path, reasoning: str, deadline_s: float = 120.0) -> AsyncIterator[Driver]:
    """Start an engine with a reasoning parser. `deadline_s`: longest wait of the driver, in seconds."""
    engine = VllmEngine(tiny_spec(), checkpoint, reasoning_parser=reasoning)
    try:
        yield Driver(Subject(engine, await engine.start(), TOKEN_LO, TOKEN_HI, deadline_s))
    finally:
        await engine.close()


async def parsed(parser: OutputParser, request: EngineRequest, answer: Answer, emitted: Sequence[int]) -> list[Any]:
    """Return the parts of an engine's answer to a request."""
    name = f"{request.request_id}-parts-{len(emitted)}"
    await parser.open(dataclasses.replace(request, request_id=name, emitted_token_ids=emitted))
    parser.divert([dataclasses.replace(output, request_id=name) for output in answer.outputs])
    return parts_of((await collect(parser, {name}))[name])
