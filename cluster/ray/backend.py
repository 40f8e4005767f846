"""Access to Ray for the controller, which does not join Ray itself.

A local Ray is accessed through a driver process, and other Ray clusters through the job API (jobs.py).
"""

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

START_S = 180.0
ANSWER_S = 30.0
_LINE_BYTES = 64 * 1024 * 1024


class RayAway(Exception):
    """Error: Ray, or the connection to Ray, does not answer. A later attempt may succeed."""


@dataclass(frozen=True, slots=True)
class RaySnapshot:
    """State of Ray at one time: the applications of this Headrace cluster, keyed by `Observed.app`, and the total
    resources of each node."""

    apps: Mapping[str, Observed]
    nodes: tuple[Mapping[str, float], ...]
    nodes_by_ray: Mapping[str, tuple[Mapping[str, float], ...]] = field(default_factory=dict)
    """Nodes by the name of the Ray cluster; empty if there is only one Ray cluster."""

    def nodes_of(self, ray: str) -> tuple[Mapping[str, float], ...]:
        """Return the nodes of the Ray cluster that is named `ray`."""
        return self.nodes_by_ray.get(ray, ()) if self.nodes_by_ray else self.nodes


class Backend(Protocol):
    """Access to a Ray cluster. Every call may raise RayAway."""

    async def observe(self) -> RaySnapshot:
        """Return Ray's current state."""

    async def deploy(self, settings: ReplicaSettings) -> None:
        """Deploy an application. If the application exists already, the replicas of the application are replaced."""

    async def scale(self, app: str, replicas: int) -> None:
        """Set the number of replicas of an application."""

    async def delete(self, app: str) -> None:
        """Drain and remove an application."""

    async def shutdown(self) -> None:
        """Shut down Serve on the Ray cluster."""

    async def close(self) -> None:
        """Release the connection. Applications keep running."""


class ChildBackend:
    """A Backend that uses a driver process (driver.py).

    The driver process is started when it is first needed, and started again if it was lost.
    """

    def __init__(
        self, cluster: str, address: str, environment: Mapping[str, str] | None = None, log_file: Path | None = None
    ) -> None:
        """Create a backend for the Ray at `address`.

        `environment`: variables that are added to the driver's environment, such as Ray's token and this cluster's tag.
        `log_file`: file for the output of the driver and of Ray; None: this process's standard error.
        """
        self._cluster = cluster
        self._address = address
        self._environment = dict(environment or {})
        self._log_file = log_file
        self._process: asyncio.subprocess.Process | None = None
        self._exchange_lock = asyncio.Lock()

    def __repr__(self) -> str:
        return f"ChildBackend({self._address}, {'up' if self._process else 'down'})"

    async def observe(self) -> RaySnapshot:
        """Return Ray's current state."""
        answer = await self._ask({"do": "observe"})
        return RaySnapshot(observed(answer["details"], self._cluster), tuple(answer["nodes"]))

    async def deploy(self, settings: ReplicaSettings) -> None:
        """Deploy an application. If the application exists already, the replicas of the application are replaced."""
        await self._ask({"do": "deploy", "settings": settings.to_json()})

    async def scale(self, app: str, replicas: int) -> None:
        """Set the number of replicas of an application."""
        await self._ask({"do": "scale", "app": app, "replicas": replicas})

    async def delete(self, app: str) -> None:
        """Drain and remove an application."""
        await self._ask({"do": "delete", "app": app})

    async def shutdown(self) -> None:
        """Shut down Serve on the Ray cluster. Serve's replicas drain."""
        await self._ask({"do": "shutdown"})

    async def close(self) -> None:
        """Kill the driver process."""
        process, self._process = self._process, None
        if process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(signal.SIGKILL)  # no state is lost; Ray's exit handlers can hang on a lost Ray
        await process.wait()

    async def _ask(self, request: Mapping[str, object]) -> Any:
        async with self._exchange_lock:
            process = self._process or await self._start()
            try:
                return await self._exchange(process, json.dumps(request), ANSWER_S)
            except (OSError, TimeoutError, EOFError) as error:
                await self.close()
                raise RayAway(f"the driver process for Ray at {self._address} was lost: {error!r}") from error
            except asyncio.CancelledError:
                await self.close()  # else the next request would read the answer to this request
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
            raise EOFError("the driver process has no pipes")
        if line:
            process.stdin.write(line.encode() + b"\n")
            await process.stdin.drain()
        async with asyncio.timeout(limit_s):  # wait_for (3.11) loses a cancellation that arrives with the answer
            text = await process.stdout.readline()
        if not text:
            raise EOFError("the driver process has ended")
        answer = json.loads(text)
        if "error" in answer:
            raise RayAway(str(answer["error"]))
        return answer["ok"]
