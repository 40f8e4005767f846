"""A gateway in a process of its own with a fleet of simulated workers, and readers of its console's events."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import grpc

from cluster.ledger.files import read_secrets
from cluster.ledger.store import Ledger
from cluster.observe.exposition import samples
from cluster.v1 import inference_pb2 as pb
from cluster.v1 import inference_pb2_grpc as pb_grpc
from loadtests.children import Child
from loadtests.processes import SIMULATED
from loadtests.scenarios.common import Stage
from loadtests.serving import ours as serving
from loadtests.serving import tenants

READY_S = 180.0
REQUEST_S = 30.0
EVENT_LIMIT = 1 << 24


@dataclass(frozen=True, slots=True)
class ConsoleBed:
    """A gateway, the pool of its workers, and keys of a caller and of an operator."""

    gateway: Child
    pool: Child
    endpoints: dict[str, str]
    caller: str
    operator: str

    @property
    def origin(self) -> str:
        """The console's address."""
        return f"http://{self.endpoints['http']}"

    async def stop(self) -> None:
        """End the processes, so that they use no CPU time during the next part."""
        await self.pool.stop()
        await self.gateway.stop()


async def start(stage: Stage, name: str, workers: int, room: int) -> ConsoleBed:
    """Start a gateway, and workers that run at most `room` sequences each; wait until all are linked. Raises
    DidNotStart."""
    model, bundle = await serving.prepare(stage.children, "tokenizer", stage.folder)
    home = stage.folder / f"{name}-tenants"
    caller = (await tenants.make_tenants(home, 1))[0]
    operator = await asyncio.to_thread(_operator_key, home)
    ((gateway, endpoints),) = await serving.start_gateways(stage.children, stage.folder, name, home)
    speed = f"decode_ms=20&prefill_tokens_per_s=1000000&max_num_seqs={room}&max_model_len=4096"
    source = f"sim://{model}?{speed}&seed={stage.options.seed}&{serving.plain_tokens(model)}"
    folder = stage.folder / f"{name}-workers"
    folder.mkdir()
    file = folder / "workers.json"
    file.write_text(json.dumps([_worker(endpoints["link"], bundle, source, folder, at) for at in range(workers)]))
    command = [sys.executable, "-m", "loadtests.serving.brood", "--folder", str(folder), "--workers", str(file)]
    pool = stage.children.start(f"{name}-pool", SIMULATED, command)

    async def linked() -> bool:
        page = await asyncio.to_thread(_page, endpoints["metrics"])
        known = [value for name, labels, value in samples(page) if name == "headrace_worker_up" and value]
        return len(known) == workers

    await pool.until(linked, f"{workers} workers are linked", READY_S)
    return ConsoleBed(gateway, pool, dict(endpoints), caller, operator)


def _worker(link: str, bundle: Path, source: str, folder: Path, number: int) -> list[str]:
    """Return the arguments of one worker."""
    arguments = ["--name", serving.MODEL, "--link", link, "--bundle", str(bundle), "--source", source]
    return [*arguments, "--ready", str(folder / f"{number}.ready"), "--engine", "{}", "--id", f"sim-{number:02}"]


def _operator_key(home: Path) -> str:
    """Return a key with the role operator."""
    ledger = Ledger(f"sqlite:///{home / 'ledger.db'}", peppers=read_secrets(home / "key-pepper", "key-pepper"))
    try:
        return ledger.keys.create(tenants.TENANT, "console", role="operator").secret
    finally:
        ledger.close()


def _page(address: str) -> str:
    host, port = address.rsplit(":", 1)
    connection = http.client.HTTPConnection(host, int(port), timeout=REQUEST_S)
    try:
        connection.request("GET", "/metrics")
        return connection.getresponse().read().decode()
    except (OSError, http.client.HTTPException):
        return ""
    finally:
        connection.close()


def sign_in(origin: str, key: str) -> str:
    """Sign in to the console with a key and return the cookie. Raises RuntimeError if the key is refused."""
    connection = http.client.HTTPConnection(origin.removeprefix("http://"), timeout=REQUEST_S)
    try:
        connection.request(
            "POST", "/console/sign-in", json.dumps({"key": key}), {"content-type": "application/json", "origin": origin}
        )
        answer = connection.getresponse()
        answer.read()
        cookie = answer.getheader("set-cookie", "")
        if answer.status != http.client.NO_CONTENT or not cookie:
            raise RuntimeError(f"the console refused the key with status {answer.status}")
        return cookie.partition(";")[0]
    finally:
        connection.close()


@dataclass(slots=True)
class ConsoleReader:
    """An open console that reads its events. `states` and `deltas`: numbers of events so far."""

    states: int = 0
    deltas: int = 0
    bytes: int = 0
    status: int = 0

    async def run(self, host: str, cookie: str) -> None:
        """Read until cancelled, or until the gateway ends the stream."""
        name, port = host.rsplit(":", 1)
        reader, writer = await asyncio.open_connection(name, int(port), limit=EVENT_LIMIT)
        try:
            writer.write(f"GET /console/events HTTP/1.1\r\nhost: {host}\r\ncookie: {cookie}\r\n\r\n".encode())
            self.status = int((await reader.readline()).split(b" ", 2)[1])
            while self.status == http.client.OK and (line := await reader.readline()):
                self.bytes += len(line)
                self.states += line.startswith(b"event: state")
                self.deltas += line.startswith(b"event: delta")
        finally:
            writer.close()


@asynccontextmanager
async def open_consoles(bed: ConsoleBed, cookie: str, count: int) -> AsyncIterator[Sequence[ConsoleReader]]:
    """Open consoles, and wait until each has its first document. Raises RuntimeError if one is refused."""
    readers = [ConsoleReader() for _ in range(count)]
    host = bed.endpoints["http"]
    tasks = [asyncio.create_task(reader.run(host, cookie)) for reader in readers]
    try:
        async with asyncio.timeout(REQUEST_S):
            while not all(reader.states for reader in readers):
                if any(task.done() for task in tasks):
                    raise RuntimeError(f"a console was refused: status {[reader.status for reader in readers]}")
                await asyncio.sleep(0.05)
        yield readers
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


@asynccontextmanager
async def streams(bed: ConsoleBed, count: int, tokens: int) -> AsyncIterator[None]:
    """Keep `count` streams running."""
    request = pb.ChatRequest(
        model=serving.MODEL, messages=[pb.Message(role="user", content="Tell me a long story")], max_tokens=tokens,
        temperature=0, ignore_eos=True,
    )  # fmt: skip

    async def keep(stub: pb_grpc.InferenceStub) -> None:
        while True:
            with contextlib.suppress(grpc.aio.AioRpcError):
                async for _ in stub.StreamChat(request, metadata=serving.authorization(bed.caller)):  # type: ignore[attr-defined]
                    pass
            await asyncio.sleep(0.01)

    async with grpc.aio.insecure_channel(bed.endpoints["grpc"]) as channel:
        stub = pb_grpc.InferenceStub(channel)
        tasks = [asyncio.create_task(keep(stub)) for _ in range(count)]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
