"""Link events from the gateways' logs, across restarts of the gateways."""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

LOOK_S = 0.02


@dataclass(frozen=True, slots=True)
class Event:
    """A log line about a link. `at`: wall-clock time."""

    at: float
    name: str
    gateway: str
    worker: str
    reason: str


class Timeline:
    """Collector of the events in the log files of pods, which are read while they grow. The files in `folder` are
    `<pod>.log`, `<pod>-2.log`, ..."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._up: dict[str, set[str]] = {}
        self._tasks: list[asyncio.Task[None]] = []
        self.events: list[Event] = []

    def follow(self, pods: list[str]) -> None:
        """Follow the logs of these pods from now on, until `close`."""
        for pod in pods:
            self._up[pod] = set()
            self._tasks.append(asyncio.create_task(self._follow(pod)))

    def up(self, pod: str) -> set[str]:
        """Return the workers to which the current process of the pod has links."""
        return self._up[pod]

    def close(self) -> None:
        """Stop following the logs."""
        for task in self._tasks:
            task.cancel()

    def since(self, at: float, name: str) -> list[Event]:
        """Return the events with this name that happened at or after `at`, in order."""
        return [event for event in self.events if event.name == name and event.at >= at]

    async def _follow(self, pod: str) -> None:
        number = 1
        while True:
            path = self._folder / (f"{pod}.log" if number == 1 else f"{pod}-{number}.log")
            after = self._folder / f"{pod}-{number + 1}.log"
            while not path.exists():  # noqa: ASYNC110 - another process's file is no event
                await asyncio.sleep(LOOK_S)
            self._up[pod] = set()
            with path.open("rb") as lines:
                rest = b""
                while True:
                    last = after.exists()
                    *whole, rest = (rest + lines.read()).split(b"\n")
                    for line in whole:
                        self._handle_line(pod, line)
                    if last:
                        break
                    await asyncio.sleep(LOOK_S)
            number += 1

    def _handle_line(self, pod: str, line: bytes) -> None:
        if b'"worker.' not in line:
            return
        try:
            entry: dict[str, Any] = json.loads(line)
        except ValueError:
            return
        if entry.get("event") not in ("worker.connected", "worker.disconnected"):
            return
        at = datetime.fromisoformat(entry["timestamp"]).timestamp()
        event = Event(at, entry["event"], pod, entry["worker"], entry.get("reason", ""))
        self.events.append(event)
        if event.name == "worker.connected":
            self._up[pod].add(event.worker)
        else:
            self._up[pod].discard(event.worker)
