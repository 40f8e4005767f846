"""SIGTERM to a gateway process. Running calls finish, and new calls are refused."""

from __future__ import annotations

import asyncio
import json
import signal
import sys
from pathlib import Path

import grpc
import pytest

from cluster.api.types import WorkerIdentity
from cluster.v1 import inference_pb2_grpc as pb_grpc
from cluster.wire.bundle import Bundle
from cluster.worker.session import WorkerSession
from tests.support.calls import chat, refused, rest_of
from tests.support.cluster import LOOPBACK, sim_engine, until


@pytest.mark.slow
async def test_sigterm_ends_a_gateway_after_its_streams(tmp_path: Path, checkpoint: Path, bundle: Bundle) -> None:
    """After SIGTERM, a running stream is completed, and a new call is refused with a hint to call another gateway. The
    process exits with code 0 as soon as the stream has ended."""
    file, ready = tmp_path / "cluster.yaml", tmp_path / "ready.json"
    file.write_text(LOOPBACK.replace("drain_timeout_s: 0", "drain_timeout_s: 30"))
    arguments = ("gateway", "-f", str(file), "--folder", str(tmp_path / "state"), "--ready-file", str(ready))
    process = await asyncio.create_subprocess_exec(sys.executable, "-m", "cluster.cli.main", *arguments)
    engine = sim_engine(checkpoint, decode_ms=4)
    info = await engine.start()
    await until(ready.exists, "the gateway is up")
    endpoints = json.loads(ready.read_text())["endpoints"]
    identity = WorkerIdentity("w", "i", "sim", bundle_digest=bundle.digest)
    end = WorkerSession(identity=identity, engine=engine, info=info, bundle=bundle, gateways=[endpoints["link"]])
    serving = asyncio.create_task(end.run())
    await until(lambda: end.statistics().promised.sequences > 0, "the gateway has room at the worker")
    try:
        async with grpc.aio.insecure_channel(endpoints["grpc"]) as channel:
            stub = pb_grpc.InferenceStub(channel)
            stream = stub.StreamChat(chat(max_tokens=500, ignore_eos=True), timeout=60)
            first = await stream.read()
            process.send_signal(signal.SIGTERM)
            chunks = [first, *await rest_of(stream)]
            assert chunks[-1].usage.completion_tokens == 500
            late = await refused(stub.Chat(chat(max_tokens=1), timeout=60))
            assert late.code is grpc.StatusCode.UNAVAILABLE
        assert await asyncio.wait_for(process.wait(), 60) == 0
        await until(lambda: end.statistics().running == 0, "nothing of it is left in the engine")
    finally:
        if process.returncode is None:
            process.kill()
        await end.close()
        await serving
