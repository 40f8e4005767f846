"""Run folder of a local cluster, with the cluster's supervisor process, endpoints and logs."""

from __future__ import annotations

import fcntl
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import psutil

from cluster.cli.base import replace_file
from cluster.config.paths import cache_dir
from cluster.process.private_files import make_private_folder


class AlreadyUp(Exception):
    """Error: another process already runs a cluster with the same name."""


def runs_dir() -> Path:
    """Return the path of the folder that contains all run folders."""
    return cache_dir() / "run"


@dataclass(frozen=True, slots=True)
class ProcessId:
    """A process id and the process's start time (Unix seconds).

    The start time distinguishes the process from a later process with the same process id.
    """

    pid: int
    created: float

    @classmethod
    def of(cls, pid: int) -> ProcessId:
        """Return the ProcessId of a running process. Raises psutil.NoSuchProcess."""
        return cls(pid, psutil.Process(pid).create_time())

    def alive(self) -> bool:
        """Return whether the process still runs."""
        try:
            process = psutil.Process(self.pid)
            return abs(process.create_time() - self.created) < 1 and process.status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False


class RunFolder:
    """The folder `<cache>/run/<name>` of a local cluster.

    The folder has state.json, logs, the configuration in use, and a lock. The process that runs the cluster holds the
    lock.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.path = runs_dir() / name

    def __repr__(self) -> str:
        return f"RunFolder({self.path})"

    @classmethod
    def running(cls) -> list[RunFolder]:
        """Return the run folders of the clusters that are up, sorted by name."""
        folders = sorted(runs_dir().iterdir()) if runs_dir().is_dir() else []
        return [run for run in (cls(folder.name) for folder in folders) if run.supervisor() is not None]

    @classmethod
    def known(cls) -> list[RunFolder]:
        """Return the run folders of the clusters that are up or have crashed, sorted by name."""
        folders = sorted(runs_dir().iterdir()) if runs_dir().is_dir() else []
        return [run for run in (cls(folder.name) for folder in folders) if run.state()]

    @property
    def state_file(self) -> Path:
        """The path of state.json, which `down` and `status` read."""
        return self.path / "state.json"

    @property
    def config_file(self) -> Path:
        """The path of the configuration file that the cluster's processes read.

        The file is the user's configuration, with each port 0 replaced by the free port that was chosen for it.
        """
        return self.path / "cluster.yaml"

    def log_file(self, part: str) -> Path:
        """Return the path of a part's log."""
        return self.path / f"{part}.log"

    def state(self) -> dict[str, Any]:
        """Read the last state from state.json. The result is empty if state.json is missing or cannot be read."""
        try:
            state = json.loads(self.state_file.read_text())
        except (OSError, ValueError):
            return {}
        return state if isinstance(state, dict) else {}

    def endpoints(self) -> dict[str, str]:
        """Return the addresses (host:port) of the first gateway process by listener name."""
        endpoints = self.state().get("endpoints")
        return dict(endpoints) if isinstance(endpoints, dict) else {}

    def siblings(self) -> list[dict[str, str]]:
        """Return addresses (host:port) by listener name, one mapping for each gateway process except the first."""
        siblings = self.state().get("siblings")
        return [dict(endpoints) for endpoints in siblings] if isinstance(siblings, list) else []

    def instance(self) -> str:
        """Return the cluster's instance id, which every process of the cluster has in its environment variables."""
        return str(self.state().get("instance", ""))

    def supervisor(self) -> ProcessId | None:
        """Return the process that runs the cluster, or None if that process has ended."""
        recorded = self.state().get("supervisor")
        if not isinstance(recorded, dict):
            return None
        process = ProcessId(int(recorded["pid"]), float(recorded["created"]))
        return process if process.alive() else None

    def write(self, state: Mapping[str, Any]) -> None:
        """Replace state.json atomically, so that a reader never sees a partial file."""
        replace_file(self.state_file, json.dumps(state, indent=2) + "\n")

    def clear(self) -> None:
        """Delete state.json. The logs stay in the folder."""
        self.state_file.unlink(missing_ok=True)

    def lock(self) -> IO[str]:
        """Lock the folder. The lock is held while the returned file is open. Raises AlreadyUp."""
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
