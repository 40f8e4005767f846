"""How the controller reaches Ray without joining it: a child process for one nearby, the job API for one elsewhere."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from cluster.policy.catalog.reconcile import Observed
from cluster.ray.serve_status import observed
from cluster.worker.settings import ReplicaSettings

START_S = 60.0
ANSWER_S = 30.0
_LINE_BYTES = 64 * 1024 * 1024


class RayAway(Exception):
    """Ray, or the way to it, does not answer; trying again later may help."""


@dataclass(frozen=True, slots=True)
class RaySnapshot:
    """What Ray says now: this cluster's applications by `Observed.app`, and each node's total resources."""

    apps: Mapping[str, Observed]
    nodes: tuple[Mapping[str, float], ...]
    nodes_by_ray: Mapping[str, tuple[Mapping[str, float], ...]] = field(default_factory=dict)
    """Where there are several Rays."""

    def nodes_of(self, ray: str) -> tuple[Mapping[str, float], ...]:
        """Those of one Ray."""
        return self.nodes_by_ray.get(ray, ()) if self.nodes_by_ray else self.nodes


class Backend(Protocol):
    """One Ray cluster. Every call raises RayAway when Ray does not answer."""

    async def observe(self) -> RaySnapshot:
        """Look."""

    async def deploy(self, settings: ReplicaSettings) -> None:
        """Make an application, or make it anew."""

    async def scale(self, app: str, replicas: int) -> None:
        """Change the number of replicas."""

    async def delete(self, app: str) -> None:
        """Drain and remove an application."""

    async def shutdown(self) -> None:
        """End Serve on that Ray."""

    async def close(self) -> None:
        """Let go of it; applications stay."""


class ChildBackend:
    """A driver process (driver.py) as a child of this one; started when needed, started again when it is lost."""

    def __init__(
        self, cluster: str, address: str, environment: Mapping[str, str] | None = None, log_file: Path | None = None
    ) -> None:
        """`environment` is added to this process's own: the token of the Ray at `address`, this cluster's tag.

        What the child and Ray print goes to `log_file`, or where this process's own errors go.
        """
        self._cluster = cluster
        self._address = address
        self._environment = dict(environment or {})
        self._log_file = log_file
        self._process: asyncio.subprocess.Process | None = None
        self._turn = asyncio.Lock()

    def __repr__(self) -> str:
        return f"ChildBackend({self._address}, {'up' if self._process else 'down'})"

    async def observe(self) -> RaySnapshot:
        """Look."""
        answer = await self._ask({"do": "observe"})
        return RaySnapshot(observed(answer["details"], self._cluster), tuple(answer["nodes"]))

    async def deploy(self, settings: ReplicaSettings) -> None:
        """Make an application, or make it anew."""
        await self._ask({"do": "deploy", "settings": settings.to_json()})

    async def scale(self, app: str, replicas: int) -> None:
        """Change the number of replicas."""
        await self._ask({"do": "scale", "app": app, "replicas": replicas})

    async def delete(self, app: str) -> None:
        """Drain and remove an application."""
        await self._ask({"do": "delete", "app": app})

    async def shutdown(self) -> None:
        """End Serve on that Ray; its replicas drain."""
        await self._ask({"do": "shutdown"})

    async def close(self) -> None:
        """End the child."""
        process, self._process = self._process, None
        if process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(signal.SIGKILL)  # it holds nothing; Ray's own exit handlers can hang on a lost Ray
        await process.wait()

    async def _ask(self, request: Mapping[str, object]) -> Any:
        async with self._turn:
            process = self._process or await self._start()
            try:
                return await self._exchange(process, json.dumps(request), ANSWER_S)
            except (OSError, TimeoutError, EOFError) as error:
                await self.close()
                raise RayAway(f"the driver process for Ray at {self._address} was lost: {error!r}") from error
            except asyncio.CancelledError:
                await self.close()  # half an exchange: the next answer would be this one's
                raise

    async def _start(self) -> asyncio.subprocess.Process:
        with self._log_file.open("ab") if self._log_file else contextlib.nullcontext() as log:
            process = self._process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "cluster.ray.driver",
                self._cluster,
                self._address,
                env={**os.environ, **self._environment},
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=log,
                limit=_LINE_BYTES,
            )
        try:
            await self._exchange(process, "", START_S)
        except (OSError, TimeoutError, EOFError) as error:
            await self.close()
            raise RayAway(f"Ray at {self._address} does not answer") from error
        return process

    async def _exchange(self, process: asyncio.subprocess.Process, line: str, limit_s: float) -> Any:
        if process.stdin is None or process.stdout is None:
            raise EOFError("no pipe")
        if line:
            process.stdin.write(line.encode() + b"\n")
            await process.stdin.drain()
        async with asyncio.timeout(limit_s):  # wait_for (3.11) loses a cancellation that comes with the answer
            text = await process.stdout.readline()
        if not text:
            raise EOFError("it has ended")
        answer = json.loads(text)
        if "error" in answer:
            raise RayAway(str(answer["error"]))
        return answer["ok"]
