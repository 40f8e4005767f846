"""A gateway in a separate process, which tests can stop or kill."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

from cluster.v1 import inference_pb2_grpc as pb_grpc
from tests.support.cluster import LOOPBACK, until


@dataclass
class GatewayProcess:
    """A running gateway process. `link`: address of the gateway for workers; `stub`: stub for calls to the gateway."""

    pid: int
    link: str
    stub: Any
    endpoints: Mapping[str, str]


@asynccontextmanager
async def gateway_process(folder: Path, text: str = LOOPBACK) -> AsyncIterator[GatewayProcess]:
    """Run a gateway on loopback with this configuration, and kill it at the end.

    The gateway's files are in and beside `folder`.
    """
    config, ready = folder.with_suffix(".yaml"), folder.with_suffix(".json")
    config.write_text(text)
    arguments = ["-f", str(config), "--folder", str(folder), "--ready-file", str(ready)]
    process = await asyncio.create_subprocess_exec(sys.executable, "-m", "cluster.cli.main", "gateway", *arguments)
    try:
        await until(ready.exists, "the other gateway serves", 240)
        endpoints = json.loads(ready.read_text())["endpoints"]
        async with grpc.aio.insecure_channel(endpoints["grpc"]) as channel:
            yield GatewayProcess(process.pid, endpoints["link"], pb_grpc.InferenceStub(channel), endpoints)
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()
