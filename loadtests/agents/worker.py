"""Program that runs Headrace's workers of the scenario in one process: python -m loadtests.agents.worker FILE

FILE is JSON: `models` (objects with `name`, `folder`, `bundle`, `tools`, `reasoning`, and `scripts` for scripted tokens
or `engine` with vLLM's engine arguments; `worker`, the worker's name, may be left out), `link` (address of the
gateway), `seed`, `prompts` (a PromptLog) and `ready` (a file that is written when all engines run). Each model has the
session, the link and the parser process of a replica.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import json
import os
import signal
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from cluster.api.ports import Engine
from cluster.api.types import ModelSpec, WorkerIdentity
from cluster.wire.bundle import Bundle
from cluster.worker.engine.processes import fork_server
from cluster.worker.parsing.kit import KitSettings
from cluster.worker.parsing.output_parser import OutputParser
from cluster.worker.parsing.parser_process import ParserHost, start_process
from cluster.worker.parsing.port import ParserNames
from cluster.worker.session import WorkerSession
from loadtests.agents.scripted import PromptLog, ScriptedEngine, Scripts


def engine_of(model: Mapping[str, Any], seed: int, prompts: PromptLog) -> Engine:
    """Return the engine of a model. vLLM is imported only for a model with engine arguments."""
    folder = Path(model["folder"])
    if "scripts" in model:
        return ScriptedEngine(Scripts.read(folder, Path(model["scripts"])), seed=seed, prompts=prompts)
    from cluster.worker.engine.vllm.engine import VllmEngine

    given = dict(model["engine"])
    spec = ModelSpec(
        model["name"], str(folder), dtype=given.pop("dtype", "auto"), max_model_len=given.pop("max_model_len", None),
        engine=given,
    )  # fmt: skip
    return VllmEngine(spec, folder, executor="mp", reasoning_parser=model["reasoning"])


async def session_of(
    model: Mapping[str, Any], engine: Engine, link: str, start: Callable[[KitSettings], ParserHost] = start_process
) -> WorkerSession:
    """Start the engine of a model and return the model's session. `start` starts the parser process."""
    names = ParserNames(model["tools"], model["reasoning"])
    info = await engine.start()
    info = dataclasses.replace(info, capabilities=(*info.capabilities, *names.capabilities))
    bundle = Bundle.load(Path(model["bundle"]))
    name = model["name"]
    return WorkerSession(
        identity=WorkerIdentity(
            f"{name}-{model.get('worker', 'w1')}", f"{os.getpid()}-{name}", name, bundle_digest=bundle.digest
        ),
        engine=engine,
        info=info,
        bundle=bundle,
        gateways=[link],
        parser=OutputParser(names, functools.partial(start, KitSettings(model["folder"], names))),
    )


async def serve(
    given: Mapping[str, Any], engine_of: Callable[[Mapping[str, Any], int, PromptLog], Engine] = engine_of
) -> None:
    """Serve all models until SIGTERM, or until one of the engines ends. `given`: the contents of the program's JSON
    file. `engine_of`: creates a model's engine."""
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    prompts = PromptLog(Path(given["prompts"]))
    engines = [engine_of(model, given["seed"], prompts) for model in given["models"]]
    try:
        pairs = zip(given["models"], engines, strict=True)
        sessions = [await session_of(model, engine, given["link"]) for model, engine in pairs]
        Path(given["ready"]).write_text("")
        running = [asyncio.create_task(session.run()) for session in sessions]
        stopping = asyncio.create_task(stop.wait())
        await asyncio.wait((*running, stopping), return_when=asyncio.FIRST_COMPLETED)
        stopping.cancel()
        await asyncio.gather(*(session.close() for session in sessions))
        await asyncio.gather(*running)
    finally:
        for engine in engines:
            with contextlib.suppress(Exception):
                await engine.close()


if __name__ == "__main__":
    fork_server.start()
    asyncio.run(serve(json.loads(Path(sys.argv[1]).read_text())))
