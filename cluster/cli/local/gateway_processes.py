"""Gateway processes of a local cluster."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from cluster.cli.commands.run.processes import part_name
from cluster.cli.local.children import Child, StartFailed, headrace_command
from cluster.cli.local.run_folder import RunFolder
from cluster.config.schema import Config

START_S = 120.0
DRAIN_S = 2.0
"""Time that running streams have to finish when a local cluster stops, in seconds."""
POLL_S = 0.05


class GatewayProcesses:
    """The gateway processes of a local cluster, and the addresses on which they listen."""

    def __init__(self, config: Config, run: RunFolder, environment: Mapping[str, str]) -> None:
        names = [part_name(process) for process in range(config.gateway.processes)]
        drain_s = min(DRAIN_S, config.gateway.drain_timeout_s)
        self._ready_files = [run.path / f"{name}.json" for name in names]
        self._endpoints: dict[int, dict[str, str]] = {}
        self.children = [
            Child(name, _command(run, process, ready_file, drain_s), environment, run.log_file(name))
            for process, (name, ready_file) in enumerate(zip(names, self._ready_files, strict=True))
        ]

    @property
    def endpoints(self) -> dict[str, str]:
        """Addresses (host:port) of the first process by listener name; empty before that process is up."""
        return dict(self._endpoints.get(0, {}))

    @property
    def siblings(self) -> list[dict[str, str]]:
        """Addresses (host:port) of the second and all further processes that are up: for each process, a mapping from
        listener name to address."""
        return [self._endpoints[process] for process in sorted(self._endpoints) if process]

    def pids(self) -> list[int]:
        """Return the process ids of the processes that run."""
        return [gateway.pid for gateway in self.children if gateway.pid is not None]

    async def start(self) -> None:
        """Start all processes. Raises StartFailed."""
        starts = (self.start_process(process) for process in range(len(self.children)))
        failures = [done for done in await asyncio.gather(*starts, return_exceptions=True) if done is not None]
        if failures:
            raise failures[0]

    async def start_process(self, process: int) -> None:
        """Start a process, and wait until the process is ready. Raises StartFailed."""
        gateway, ready_file = self.children[process], self._ready_files[process]
        ready_file.unlink(missing_ok=True)
        await gateway.start()
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline:
            if gateway.pid is None:
                raise StartFailed(f"the {gateway.name} ended while starting:\n{gateway.log_tail()}")
            with suppress(OSError, ValueError):
                ready = json.loads(ready_file.read_text())
                if ready["pid"] == gateway.pid:
                    self._endpoints[process] = dict(ready["endpoints"])
                    return
            await asyncio.sleep(POLL_S)
        raise StartFailed(
            f"the {gateway.name} was not ready within {START_S:g} s:\n{gateway.log_tail()}\n"
            f"  its log: {gateway.log_file}"
        )

    async def stop(self) -> None:
        """Stop all processes. Running streams have DRAIN_S to finish."""
        await asyncio.gather(*(gateway.stop(DRAIN_S + 2.0) for gateway in self.children))


def _command(run: RunFolder, process: int, ready_file: Path, drain_s: float) -> list[str]:
    return headrace_command(
        "gateway", "-f", run.config_file, "--process", process, "--folder", run.path / part_name(process),
        "--ready-file", ready_file, "--drain-s", drain_s,
    )  # fmt: skip
