"""Program that runs one worker without Ray, on the simulated engine or on vLLM, with the replica's own parts.

python -m loadtests.serving.worker --name MODEL --link HOST:PORT --bundle DIR --ready FILE --source SOURCE

SOURCE is `sim:///folder?...`, or a model folder that vLLM loads with the arguments of --engine (JSON). The file
--ready is written when the engine runs.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from cluster.api.ports import AdapterEngine, Engine, KvEventSource
from cluster.api.types import ModelSpec, WorkerIdentity
from cluster.process import memory
from cluster.wire.bundle import Bundle
from cluster.wire.dial import Timing
from cluster.worker.engine.simulated.engine import SCHEME, SimConfig, SimEngine
from cluster.worker.parsing.model_parser import model_parser, requested_parser, with_parsers
from cluster.worker.parsing.output_parser import OutputParser
from cluster.worker.session import WorkerSession
from cluster.worker.weights.adapter_store import AdapterStore
from cluster.worker.weights.sources import SourceRules


def spec_of(arguments: argparse.Namespace) -> ModelSpec:
    """Return the model's specification, from the command line."""
    given = json.loads(arguments.engine)
    return ModelSpec(
        arguments.name,
        arguments.source,
        dtype=given.pop("dtype", "auto"),
        max_model_len=given.pop("max_model_len", None),
        tensor_parallel_size=given.pop("tensor_parallel_size", 1),
        engine=given,
    )


class WholeEngine(Engine, KvEventSource, AdapterEngine, Protocol):
    """An engine that reports KV events and loads adapters."""


def opened(arguments: argparse.Namespace, bundle: Bundle) -> tuple[WholeEngine, OutputParser | None]:
    """Return the engine for `arguments.source`, and the parser of its outputs. The source is a model folder, or the
    source string of a simulated engine. vLLM is imported only for a model folder, or if the engine's arguments name a
    parser."""
    spec = spec_of(arguments)
    if arguments.source.startswith(SCHEME):
        config = SimConfig.from_source(arguments.source)
        return SimEngine(config), requested_parser(spec, Path(config.folder), bundle)
    from cluster.worker.engine.vllm.engine import VllmEngine

    parser = model_parser(spec, Path(arguments.source), bundle)
    reasoning = parser.names.reasoning if parser is not None else ""
    return VllmEngine(spec, Path(arguments.source), executor="mp", reasoning_parser=reasoning), parser


def adapter_files(arguments: argparse.Namespace) -> AdapterStore | None:
    """Return the worker's store of adapters; None if the engine takes no adapters. The store's cache folder is next to
    the file `--ready`."""
    engine = json.loads(arguments.engine)
    if not engine.get("enable_lora"):
        return None
    rules = SourceRules(Path(arguments.ready).parent / f"{Path(arguments.ready).name}.cache")
    base = None if arguments.source.startswith(SCHEME) else Path(arguments.source)
    return AdapterStore(rules, base, int(engine["max_lora_rank"]))


async def serve(arguments: argparse.Namespace) -> None:
    """Serve until SIGTERM, or until the engine ends."""
    bundle = Bundle.load(Path(arguments.bundle))
    engine, parser = opened(arguments, bundle)
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    files = adapter_files(arguments)
    try:
        info = with_parsers(await engine.start(), parser)
        identity = WorkerIdentity(
            worker_id=arguments.id or f"{arguments.name}-w1",
            incarnation=f"{os.getpid()}",
            model=arguments.name,
            bundle_digest=bundle.digest,
        )
        end = WorkerSession(
            identity=identity,
            engine=engine,
            info=info,
            bundle=bundle,
            gateways=[arguments.link],
            timing=Timing(redial_max_s=arguments.redial_max_s),
            parser=parser,
            kv_events=engine,
            adapter_engine=engine if files is not None else None,
            adapter_files=files,
        )
        Path(arguments.ready).write_text(json.dumps({"pid": os.getpid(), "engine": info.engine_version}))
        memory.freeze_objects()
        running = asyncio.create_task(end.run())
        stopping = asyncio.create_task(stop.wait())
        await asyncio.wait((running, stopping), return_when=asyncio.FIRST_COMPLETED)
        stopping.cancel()
        await end.close()
        await running
    finally:
        with contextlib.suppress(Exception):
            await engine.close()


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line and return the arguments."""
    parser = argparse.ArgumentParser()
    for name in ("name", "link", "bundle", "ready", "source"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--engine", default="{}")
    parser.add_argument("--redial-max-s", type=float, default=Timing().redial_max_s)
    parser.add_argument("--id", default="", help="number of the worker, if there are several")
    return parser.parse_args(words)


if __name__ == "__main__":
    asyncio.run(serve(parse()))
