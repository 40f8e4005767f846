"""Run folder of a local cluster: its supervisor process, its endpoints and the logs of its parts."""

from __future__ import annotations

import fcntl
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import psutil

from cluster.cli.base import replace_file
from cluster.config.schema import cache_dir
from cluster.process.private_files import make_private_folder


class AlreadyUp(Exception):
    """A cluster of this name is already run by another process."""


def runs_dir() -> Path:
    """The folder that contains all run folders."""
    return cache_dir() / "run"


@dataclass(frozen=True, slots=True)
class ProcessId:
    """A pid and its start time (Unix seconds), so that a reused pid is not mistaken for the process."""

    pid: int
    created: float

    @classmethod
    def of(cls, pid: int) -> ProcessId:
        """The id of a running process. Raises psutil.NoSuchProcess."""
        return cls(pid, psutil.Process(pid).create_time())

    def alive(self) -> bool:
        """Whether this very process still runs."""
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
        """The folders of clusters that are up, sorted by name."""
        folders = sorted(runs_dir().iterdir()) if runs_dir().is_dir() else []
        return [run for run in (cls(folder.name) for folder in folders) if run.supervisor() is not None]

    @classmethod
    def known(cls) -> list[RunFolder]:
        """The folders of clusters that are up or that crashed."""
        folders = sorted(runs_dir().iterdir()) if runs_dir().is_dir() else []
        return [run for run in (cls(folder.name) for folder in folders) if run.state()]

    @property
    def state_file(self) -> Path:
        """The path of state.json, which `down` and `status` read."""
        return self.path / "state.json"

    @property
    def config_file(self) -> Path:
        """The path of the configuration that the parts read: the user's, with every port chosen."""
        return self.path / "cluster.yaml"

    def log_file(self, part: str) -> Path:
        """The path of a part's log."""
        return self.path / f"{part}.log"

    def state(self) -> dict[str, Any]:
        """Read the state last written; empty if there is none or it cannot be read."""
        try:
            state = json.loads(self.state_file.read_text())
        except (OSError, ValueError):
            return {}
        return state if isinstance(state, dict) else {}

    def endpoints(self) -> dict[str, str]:
        """Listener name -> host:port of the first gateway process."""
        endpoints = self.state().get("endpoints")
        return dict(endpoints) if isinstance(endpoints, dict) else {}

    def siblings(self) -> list[dict[str, str]]:
        """The endpoints of the other gateway processes."""
        siblings = self.state().get("siblings")
        return [dict(endpoints) for endpoints in siblings] if isinstance(siblings, list) else []

    def instance(self) -> str:
        """The instance id that all processes of the cluster have in their environment."""
        return str(self.state().get("instance", ""))

    def supervisor(self) -> ProcessId | None:
        """The process that runs the cluster; None if it has ended."""
        recorded = self.state().get("supervisor")
        if not isinstance(recorded, dict):
            return None
        process = ProcessId(int(recorded["pid"]), float(recorded["created"]))
        return process if process.alive() else None

    def write(self, state: Mapping[str, Any]) -> None:
        """Replace state.json atomically, so that a reader never sees a partial file."""
        replace_file(self.state_file, json.dumps(state, indent=2) + "\n")

    def clear(self) -> None:
        """Delete state.json; the logs stay."""
        self.state_file.unlink(missing_ok=True)

    def lock(self) -> IO[str]:
        """Lock the folder while the returned file is open. Raises AlreadyUp."""
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
