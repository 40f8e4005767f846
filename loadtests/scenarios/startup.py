"""Start-up: the time from the gateway's exec to the first routed request, with a tokenizer of 128,000 pieces.

A worker already runs and dials. The gateway has an empty folder: it must fetch the tokenizer from the worker, load the
tokenizer, and route. The caller tries the port every few milliseconds, and repeats its call until the first text
arrives. A gRPC channel that is created before the gateway's port is open would wait a tenth of a second and more
between attempts.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from contextlib import suppress
from pathlib import Path

from cluster.process.ports import free_port
from loadtests.children import Children, DidNotStart
from loadtests.faces import CallFailed, Request
from loadtests.faces.grpc_stream import GrpcStream
from loadtests.figures import Bound, mean, plain_figure
from loadtests.scenarios.common import Stage, rounds_of
from loadtests.serving import ours as serving
from loadtests.serving import tenants

HEAVY = ("torch", "vllm", "ray", "transformers")
STARTUP = "gateway exec to first routed request, 128k-vocabulary tokenizer"
BOUND = Bound("<=", 1.0)
FIRST_S = 120.0
AGAIN_S, REDIAL_S = 0.005, 0.1


async def play(stage: Stage) -> None:
    """Start a gateway as many times as there are rounds, one start after the other."""
    rounds = rounds_of(stage.options)
    model, bundle = await serving.prepare(stage.children, "big", stage.folder)
    seconds: list[float] = []
    heavy: set[str] = set()
    for number in range(1, rounds + 1):
        took, modules = await one_start(stage.folder / f"start-{number}", model, bundle, number)
        seconds.append(took)
        heavy |= {name.split(".")[0] for name in modules} & set(HEAVY)
        stage.screen.say(f"start {number}: {took:.3f} s, {len(modules)} modules")
    stage.report.settings |= {f"{stage.part}starts_s": [round(s, 4) for s in seconds], "redial_s": REDIAL_S}
    if heavy:
        stage.report.problems.append(f"the gateway imports {', '.join(sorted(heavy))}")
    imports = ", ".join(sorted(heavy)) if heavy else f"none of {', '.join(HEAVY)}"
    note = f"imports {imports}; the worker redials every {REDIAL_S} s"
    figure = plain_figure(STARTUP, mean(seconds), "s", BOUND, len(seconds), note=note)
    stage.report.figures.append(figure)


async def one_start(folder: Path, model: Path, bundle: Path, number: int) -> tuple[float, list[str]]:
    """Return the seconds from exec to the first text, and the modules that the gateway had imported at its end."""
    link, clients = free_port(), free_port()
    folder.mkdir(parents=True, exist_ok=True)
    modules, ready = folder / "modules.json", folder / "worker.ready"
    key = await tenants.make_key(folder)
    text = serving.configuration(serving.MODEL, folder, link=f"127.0.0.1:{link}", grpc=f"127.0.0.1:{clients}")
    async with Children(folder) as children:
        command = [sys.executable, "-m", "loadtests.serving.worker", "--name", serving.MODEL]
        command += ["--link", f"127.0.0.1:{link}", "--bundle", str(bundle), "--ready", str(ready)]
        source = f"sim://{model}?decode_ms=1&{serving.plain_tokens(model)}"
        command += ["--source", source, "--redial-max-s", str(REDIAL_S)]
        worker = children.start("worker", serving.WORKER, command)

        async def runs() -> bool:
            return ready.exists()

        await worker.until(runs, "its engine runs", 60.0)
        began = time.perf_counter()
        gateway = serving.exec_gateway(children, folder, "gateway", text, ("--modules", str(modules)))
        took = await _first_text(f"127.0.0.1:{clients}", key, began)
        await gateway.stop()
    if not modules.exists():
        raise DidNotStart(f"the gateway wrote no list of modules; its log ends:\n{gateway.tail()}")
    return took, json.loads(modules.read_text())


async def _until_open(address: str, until: float) -> None:
    """Wait until the port accepts connections, or until the monotonic time `until`."""
    host, port = address.rsplit(":", 1)
    while time.perf_counter() < until:
        with suppress(OSError):
            _, writer = await asyncio.open_connection(host, int(port))
            writer.close()
            return
        await asyncio.sleep(AGAIN_S)


async def _first_text(address: str, key: str, began: float) -> float:
    await _until_open(address, began + FIRST_S)
    request = Request("first", "hello", 1, chat=True)
    first: list[float] = []
    face = GrpcStream(address, serving.MODEL, channels=1, metadata=serving.authorization(key))
    try:
        why = ""
        while time.perf_counter() - began < FIRST_S:
            try:
                await face.run(request, lambda text: first.append(time.perf_counter()))
                if first:
                    return first[0] - began
                why = "an answer without text"
            except CallFailed as error:
                why = str(error)
            await asyncio.sleep(AGAIN_S)
        raise DidNotStart(f"no request was routed within {FIRST_S:g} s: {why}")
    finally:
        await face.close()
