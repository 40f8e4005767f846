"""vLLM's own OpenAI server as a child process. The server listens on a free loopback port and ends with all
descendants.
"""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx

from cluster.process.ports import free_port
from tests.differential.answers import Answer, of_peer
from tests.differential.cases import MODEL, Case

START_S = 400.0
END_S = 15.0
ANSWER_S = 240.0
"""Timeout of a call in seconds. A call that runs until the context is full may take long on a busy machine."""
IDLE_S = 1.0
"""Time in seconds after which an idle connection is not reused. The server closes idle connections after 5 s, and a
request sent at that moment is lost.
"""

# The guard ends its whole process group when its standard input closes: the server ends even if the tests are killed.
_GUARD = '"$@" </dev/null & read -r _; kill -KILL 0'


class Peer:
    """vLLM's server, which may still be starting, and an HTTP client for the server."""

    def __init__(self, client: httpx.AsyncClient, process: subprocess.Popen[bytes], log: Path) -> None:
        self._client = client
        self._process = process
        self._log = log

    async def ready(self) -> None:
        """Wait until the server serves. Raises AssertionError with the end of the server's log if it does not."""
        deadline = time.monotonic() + START_S
        while not await self._healthy():
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise AssertionError(f"vLLM's server did not start:\n{_tail(self._log)}")
            await asyncio.sleep(0.1)

    async def _healthy(self) -> bool:
        try:
            return (await self._client.get("/health")).status_code == 200
        except httpx.TransportError:
            return False

    async def ask(self, case: Case) -> Answer:
        """Return the server's answer to a case."""
        path, body = case.http()
        try:
            response = await self._post(path, body)
        except httpx.TransportError as error:
            raise AssertionError(f"vLLM's server broke off: {error!r}, {case}\n{_tail(self._log)}") from error
        return of_peer(response.status_code, response.json())

    async def _post(self, path: str, body: Mapping[str, Any]) -> httpx.Response:
        """Post a request. If the kept-alive connection ends without an answer, post the request once more. The tests do
        not compare how servers close such connections."""
        try:
            return await self._client.post(path, json=body)
        except (httpx.ReadError, httpx.WriteError, httpx.RemoteProtocolError) as error:
            print(f"asked again: {error!r}")
            return await self._client.post(path, json=body)


@asynccontextmanager
async def running_peer(folder: Path, arguments: Mapping[str, object], log: Path) -> AsyncIterator[Peer]:
    """Run vLLM's own server for the model in `folder` while the context is open. `arguments`: vLLM's arguments, by
    their names in Python."""
    port = free_port()
    command = ["bash", "-c", _GUARD, "guard", sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
    command += ["--model", str(folder), "--served-model-name", MODEL, "--host", "127.0.0.1", "--port", str(port)]
    for name, value in arguments.items():
        flag = "--" + name.replace("_", "-")
        command += [flag] if value is True else [flag, str(value)]
    # Ranks meet through a file that vLLM creates and does not remove.
    with tempfile.TemporaryDirectory(prefix="hr-") as meeting, log.open("wb") as output:
        process = subprocess.Popen(  # noqa: ASYNC220 - forks a small process, does not wait for it
            command,
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env=_environment() | {"TMPDIR": meeting},
        )
        try:
            limits = httpx.Limits(keepalive_expiry=IDLE_S)
            base = f"http://127.0.0.1:{port}"
            async with httpx.AsyncClient(base_url=base, timeout=ANSWER_S, trust_env=False, limits=limits) as client:
                yield Peer(client, process, log)
        finally:
            await _end(process)


def _environment() -> dict[str, str]:
    """Return the environment of this process without the settings of our own engine: the peer must
    be unmodified vLLM.
    """
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("HEADRACE_")}
    return inherited | {"VLLM_WORKER_MULTIPROC_METHOD": "spawn"}


def _tail(log: Path) -> str:
    return "\n".join(log.read_text().splitlines()[-30:])


async def _end(process: subprocess.Popen[bytes]) -> None:
    """End the process group: by SIGTERM first, then by SIGKILL."""
    deadline = time.monotonic() + END_S
    for number in (signal.SIGTERM, signal.SIGKILL):
        _signal(process.pid, number)
        while _signal(process.pid, 0) and (number == signal.SIGKILL or time.monotonic() < deadline):
            process.poll()
            await asyncio.sleep(0.05)
    assert process.stdin is not None
    process.stdin.close()
    process.wait()


def _signal(group: int, number: int) -> bool:
    try:
        os.killpg(group, number)
    except ProcessLookupError:
        return False
    return True
