"""Start-up of both sides of a comparison, each with a base model and adapters: vLLM's own server, and a gateway with a
worker and a catalog.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from cluster.api.adapters import AdapterSpec, full_name
from cluster.api.types import CatalogEntry
from cluster.controller.links import ControllerLinks
from loadtests import peers
from loadtests.agents.servers import ENVIRONMENT
from loadtests.faces.base import CallFailed, Request
from loadtests.faces.openai_sse import OpenAiSse
from loadtests.scenarios.common import Stage
from loadtests.serving import ours as serving

ENGINE: Mapping[str, object] = {
    "dtype": "float32", "max_model_len": 2048, "max_num_seqs": 64, "kv_cache_memory_bytes": 256 << 20,
    "enable_lora": True, "max_lora_rank": 8,
}  # fmt: skip
THREADS = {"OMP_NUM_THREADS": "1"}
READY_S = 120.0


class ModelsClient(OpenAiSse):
    """Client of OpenAI's API that can list the models."""

    async def cards(self) -> dict[str, dict[str, Any]]:
        """Return the server's list of models, by name. Raises CallFailed."""
        connection, pieces = await self._connection(), list[bytes]()
        try:
            head = f"GET /v1/models HTTP/1.1\r\nHost: {self._host}:{self._port}\r\n{self._key}\r\n"
            await connection.request(head.encode(), pieces.append)
        finally:
            connection.close()
        return {card["id"]: card for card in json.loads(b"".join(pieces))["data"]}


async def prepare(stage: Stage, count: int) -> Path:
    """Write the base model and `count` adapters; return their folder. Raises DidNotStart."""
    folder = stage.folder / f"adapters-{count}"
    command = [sys.executable, "-m", "loadtests.adapters.prepare", str(folder), str(count)]
    child = stage.children.start(f"prepare-{count}-adapters", "preparation", command)

    async def written() -> bool:
        return await asyncio.to_thread((folder / "ready").exists)

    await child.until(written, "the base model and its adapters are written", serving.PREPARE_S)
    await child.stop()
    return folder


def names(count: int) -> list[str]:
    """Return the names of adapters."""
    return [f"a{number}" for number in range(count)]


def modules(folder: Path, count: int) -> list[str]:
    """Return the value of vLLM's argument lora_modules for the adapters. The adapters have the same names in vLLM as in
    Headrace."""
    return [f"{full_name(serving.MODEL, name)}={folder / 'adapters' / name}" for name in names(count)]


async def start_server(stage: Stage, folder: Path, count: int, engine: Mapping[str, object]) -> peers.Peer:
    """Start vLLM's own server with `count` adapters, which have the same names as in Headrace's model. Raises
    DidNotStart."""
    arguments = {**ENGINE, **engine, "enforce_eager": True, "lora_modules": modules(folder, count)}
    server, _ = await peers.vllm_server(
        stage.children, serving.MODEL, folder / "model", arguments, {**ENVIRONMENT, **THREADS}
    )
    return server


@contextlib.asynccontextmanager
async def running(
    stage: Stage, folder: Path, adapters: Sequence[str], engine: Mapping[str, object], later: Sequence[str] = ()
) -> AsyncIterator[serving.Ours]:
    """Run a gateway with a worker, and declare adapters to the gateway as a controller does. Raises DidNotStart.

    The context begins when all `adapters` are ready. The adapters in `later` are declared, too, but need not be ready
    then.
    """
    ours = await serving.start(
        stage.children, stage.folder, bundle=folder / "bundle", source=str(folder / "model"),
        engine={**ENGINE, **engine}, environment={**ENVIRONMENT, **THREADS},
    )  # fmt: skip
    async with declared(ours, folder, adapters, later):
        yield ours


@contextlib.asynccontextmanager
async def declared(
    ours: serving.Ours, folder: Path, adapters: Sequence[str], later: Sequence[str] = ()
) -> AsyncIterator[None]:
    """Act as the controller of a running gateway. First declare the adapters `adapters` in the catalog and wait until
    the gateway serves all of them. Then declare the adapters in `later` too, without waiting. Raises TimeoutError."""
    links = ControllerLinks(
        controller_id="loadtest", gateways=[ours.endpoints["link"]], tls=None, bundles=lambda _: None
    )

    def declare(names: Sequence[str]) -> None:
        specs = tuple(AdapterSpec(name, str(folder / "adapters" / name)) for name in names)
        links.publish([CatalogEntry(serving.MODEL, adapters=specs)])

    declare(adapters)
    task = asyncio.create_task(links.run())
    face = OpenAiSse(ours.http, serving.MODEL, api_key=ours.key)
    try:
        async with asyncio.timeout(READY_S):
            for name in adapters:
                await _until_served(face, full_name(serving.MODEL, name))
        if later:
            declare([*adapters, *later])
        yield
    finally:
        await face.close()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def _until_served(face: OpenAiSse, model: str) -> None:
    while True:
        try:
            await face.run(Request("ready", "hello", 1, model=model), lambda text: None)
            return
        except CallFailed:
            await asyncio.sleep(0.1)
