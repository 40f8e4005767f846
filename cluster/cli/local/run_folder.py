"""The run folder of a local cluster: who runs it, where it answers, and where its parts write their logs."""

from __future__ import annotations

import fcntl
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import psutil

from cluster.cli.base import write_whole
from cluster.config.schema import cache_dir
from cluster.process.private_files import make_private_folder


class AlreadyUp(Exception):
    """Another process runs a cluster of this name."""


def runs_dir() -> Path:
    """Where run folders lie."""
    return cache_dir() / "run"


@dataclass(frozen=True, slots=True)
class ProcessId:
    """A pid together with when it was started, so that a pid used again is never taken for ours."""

    pid: int
    created: float

    @classmethod
    def of(cls, pid: int) -> ProcessId:
        """Of a living process. Raises psutil.NoSuchProcess."""
        return cls(pid, psutil.Process(pid).create_time())

    def alive(self) -> bool:
        """Whether exactly this process still runs."""
        try:
            process = psutil.Process(self.pid)
            return abs(process.create_time() - self.created) < 1 and process.status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False


class RunFolder:
    """`<cache>/run/<name>`: state.json, logs, the configuration in use, and a lock held by the process that runs it."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.path = runs_dir() / name

    def __repr__(self) -> str:
        return f"RunFolder({self.path})"

    @classmethod
    def running(cls) -> list[RunFolder]:
        """The folders of clusters that are up, by name."""
        folders = sorted(runs_dir().iterdir()) if runs_dir().is_dir() else []
        return [run for run in (cls(folder.name) for folder in folders) if run.supervisor() is not None]

    @classmethod
    def known(cls) -> list[RunFolder]:
        """The folders of clusters that are up, or that ended without clearing up."""
        folders = sorted(runs_dir().iterdir()) if runs_dir().is_dir() else []
        return [run for run in (cls(folder.name) for folder in folders) if run.state()]

    @property
    def state_file(self) -> Path:
        """What `down` and `status` read."""
        return self.path / "state.json"

    @property
    def config_file(self) -> Path:
        """The configuration that the parts read: the user's, with every port decided."""
        return self.path / "cluster.yaml"

    def log_file(self, part: str) -> Path:
        """Where a part writes."""
        return self.path / f"{part}.log"

    def state(self) -> dict[str, Any]:
        """What was last written; empty when there is nothing, or nothing readable."""
        try:
            found = json.loads(self.state_file.read_text())
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    def endpoints(self) -> dict[str, str]:
        """Listener -> host:port."""
        found = self.state().get("endpoints")
        return dict(found) if isinstance(found, dict) else {}

    def siblings(self) -> list[dict[str, str]]:
        """The endpoints of the gateway processes beside the first."""
        found = self.state().get("siblings")
        return [dict(one) for one in found] if isinstance(found, list) else []

    def instance(self) -> str:
        """The tag that all processes of the cluster carry in their environment."""
        return str(self.state().get("instance", ""))

    def supervisor(self) -> ProcessId | None:
        """The process that runs the cluster, if it lives."""
        found = self.state().get("supervisor")
        if not isinstance(found, dict):
            return None
        process = ProcessId(int(found["pid"]), float(found["created"]))
        return process if process.alive() else None

    def write(self, state: Mapping[str, Any]) -> None:
        """Replace state.json as a whole, so that a reader never sees half of it."""
        write_whole(self.state_file, json.dumps(state, indent=2) + "\n")

    def clear(self) -> None:
        """Forget the cluster; logs stay."""
        self.state_file.unlink(missing_ok=True)

    def lock(self) -> IO[str]:
        """Hold the folder for as long as the returned file is open. Raises AlreadyUp."""
        make_private_folder(cache_dir())
        make_private_folder(self.path)
        handle = (self.path / "lock").open("a")
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            handle.close()
            supervisor = self.supervisor()
            who = f" (process {supervisor.pid})" if supervisor else ""
            raise AlreadyUp(
                f"a cluster named {self.name!r} is already up{who}: see `headrace status`, end it with "
                f"`headrace down {self.name}`, or give this one another `name`"
            ) from None
        return handle
