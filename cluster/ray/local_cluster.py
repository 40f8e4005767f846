"""The local Ray of `headrace up`: a child process on free ports with its own folder.

A stop ends all processes of this Ray. Another Ray on the machine is neither used nor disturbed: no default port is
used, addresses are always passed explicitly, and the stop selects processes only by this cluster's tag, never by name.
Ray's token authentication is on, since Ray's ports cannot be restricted to loopback.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from cluster.process.ports import free_ports
from cluster.process.private_files import make_private_folder
from cluster.ray import reaper
from cluster.ray.drain_time import TIMEOUT_ENV, ray_timeout_s
from cluster.worker.engine.processes import end_causes, sockets

OBJECT_STORE_BYTES = 128 * 1024 * 1024
LOGICAL_GPUS = 64
LOGICAL_CPUS = 64
_NO_IDLE_WORKERS = {"RAY_prestart_worker_first_driver": "0"}
"""Replicas have environments of their own, so they never use the processes that Ray starts for the first driver."""
_START_S = 180.0
_DRAINING = "received SIGTERM. Draining for up to"
_ENDED, _SEVERE = "subprocesses exited unexpectedly", re.compile(r"\[\S+ \S+ [WECF] \d+ \d+\] ")
"""In Ray's output: one of its processes has ended; a line of a log at level warning, error, check or fatal."""
_POLL_S = 0.05


class RayDidNotStart(RuntimeError):
    """Error: the local Ray did not start. The message contains the end of Ray's log."""


@dataclass(frozen=True, slots=True)
class LocalRaySettings:
    """Settings of a local Ray.

    `gpus`: number of GPUs; None: as many as the machine has, or LOGICAL_GPUS logical GPUs if it has none.
    """

    instance: str
    run_folder: Path
    cpus: int = LOGICAL_CPUS
    gpus: int | None = None
    dashboard: bool = False
    object_store_bytes: int = OBJECT_STORE_BYTES
    drain_timeout_s: float = 300.0
    """Seconds in which calls may end or resume elsewhere after SIGTERM to Ray. `LocalRay.stop` does not wait for these
    calls."""


class LocalRay:
    """A `ray start --head --block` child process.

    After `start`, other processes can join this Ray with `address` and `environment`.
    """

    def __init__(self, settings: LocalRaySettings) -> None:
        self._settings = settings
        self._token = secrets.token_hex(32)
        self._process: subprocess.Popen[bytes] | None = None
        self._stopping = threading.Lock()  # a start that fails stops Ray too, in its own thread
        self.address = ""
        self.dashboard_url = ""
        # A Unix socket's path must stay below 108 bytes, of which Ray's part takes about 75.
        self._folder = _short_folder(settings)

    def __repr__(self) -> str:
        return f"LocalRay({self._settings.instance}, {self.address or 'not started'})"

    @property
    def log_file(self) -> Path:
        """File with Ray's start-up output."""
        return self._settings.run_folder / "ray.log"

    def log_tail(self, lines: int = 20) -> str:
        """Return the last lines of Ray's output. If one of Ray's processes has ended, return the lines that name it and
        its last warnings and errors."""
        said = self.log_file.read_text(errors="replace").splitlines()
        ended = [number for number, line in enumerate(said) if _ENDED in line or "[exit code=" in line]
        if not ended:
            return "\n".join(said[-lines:])
        severe = [line for line in said[ended[-1] :] if _SEVERE.search(line)]
        return "\n".join([*(said[number] for number in ended), *severe[-lines:]])

    @property
    def folder(self) -> Path:
        """Folder of Ray's session, which contains the logs of every replica."""
        return self._folder

    @property
    def pid(self) -> int | None:
        """Process id of the Ray child process; None if that process does not run."""
        return self._process.pid if self._process is not None and self._process.poll() is None else None

    def environment(self) -> dict[str, str]:
        """Return the environment variables with which a process joins this Ray.

        The variables must be set before that process imports ray.
        """
        return {
            reaper.INSTANCE_ENV: self._settings.instance,
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": self._token,
            "RAY_USAGE_STATS_ENABLED": "0",
            **({"RAY_ADDRESS": self.address} if self.address else {}),
        }

    def start(self) -> None:
        """Start Ray, and wait until Ray accepts connections. Raises RayDidNotStart."""
        make_private_folder(self._settings.run_folder)
        self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        if self._folder.stat().st_uid != os.getuid():
            raise RayDidNotStart(f"{self._folder} belongs to another user: remove it, or choose another instance name")
        (self._folder / "ray_current_cluster").unlink(missing_ok=True)
        port, client_port, dashboard_port, autoscaler_metrics, dashboard_metrics = free_ports(5)
        self.dashboard_url = f"http://127.0.0.1:{dashboard_port}" if self._settings.dashboard else ""
        with self.log_file.open("wb") as log:
            self._process = subprocess.Popen(
                self._command(port, client_port, dashboard_port),
                env={
                    **_without_other_ray(os.environ),
                    **self.environment(),
                    "PYTHONUNBUFFERED": "1",
                    **_NO_IDLE_WORKERS,
                    TIMEOUT_ENV: str(ray_timeout_s(self._settings.drain_timeout_s)),
                    "AUTOSCALER_METRIC_PORT": str(autoscaler_metrics),
                    "DASHBOARD_METRIC_PORT": str(dashboard_metrics),
                },
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._wait_until_up(self._process, port)

    def _command(self, port: int, client_port: int, dashboard_port: int) -> list[str]:
        settings = self._settings
        gpus = settings.gpus if settings.gpus is not None else (None if has_gpus() else LOGICAL_GPUS)
        return [
            sys.executable,
            "-m",
            "ray.scripts.scripts",
            "start",
            "--head",
            "--block",
            f"--port={port}",
            f"--ray-client-server-port={client_port}",
            f"--dashboard-port={dashboard_port}",
            "--dashboard-host=127.0.0.1",
            f"--include-dashboard={'true' if settings.dashboard else 'false'}",
            "--dashboard-agent-listen-port=0",
            "--min-worker-port=0",
            "--max-worker-port=0",
            f"--temp-dir={self._folder}",
            f"--num-cpus={settings.cpus}",
            f"--object-store-memory={settings.object_store_bytes}",
            "--disable-usage-stats",
            "--include-log-monitor=false",  # it sends replicas' output to drivers, and Headrace's driver wants none
            "--log-color=false",
            *([f"--num-gpus={gpus}"] if gpus is not None else []),
        ]

    def _wait_until_up(self, process: subprocess.Popen[bytes], port: int) -> None:
        address_file = self._folder / "ray_current_cluster"
        deadline = time.monotonic() + _START_S
        while time.monotonic() < deadline:
            # Ray writes this file last, and only this file has the address that Ray chose.
            address = address_file.read_text().strip() if address_file.exists() else ""
            if address.endswith(f":{port}"):
                self.address = address
                return
            if process.poll() is not None:
                log = self.log_tail()
                self.stop()
                raise RayDidNotStart(f"Ray ended with {process.returncode} while starting:\n{log}")
            time.sleep(_POLL_S)
        log = self.log_tail()
        self.stop()
        raise RayDidNotStart(f"Ray did not start within {_START_S:g} s:\n{log}")

    def stop(self, grace_s: float = 1.0) -> int:
        """End Ray and every process of this cluster except the calling process. Returns the number of processes that
        were found. Idempotent.

        Call Backend.shutdown first, so that Serve's replicas drain.
        """
        with self._stopping:
            self._signal(signal.SIGTERM)
            ended = reaper.end(self._settings.instance, self._folder, grace_s=grace_s)
            if self._process is not None:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self._process.wait(timeout=2.0)
                self._process = None
            _keep_logs(self._folder, self._settings.run_folder)
        return ended

    @property
    def is_draining(self) -> bool:
        """Whether Ray has received SIGTERM and waits for the replicas. This state is read from Ray's output."""
        try:
            return _DRAINING in self.log_file.read_text(errors="replace")
        except OSError:
            return False

    def kill(self) -> None:
        """Kill only Ray's main process. Does not wait until that process has ended."""
        self._signal(signal.SIGKILL)

    def _signal(self, number: int) -> None:
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(number)


def end_remains(instance: str, run_folder: Path) -> int:
    """End the processes that are left of a cluster whose main process has ended. Returns their number."""
    folder = _short_folder(LocalRaySettings(instance, run_folder))
    ended = reaper.end(instance, folder)
    _keep_logs(folder, run_folder)
    return ended


def has_gpus() -> bool:
    """Return whether this machine has GPUs that Ray detects."""
    return any(Path("/dev").glob("nvidia[0-9]*")) or Path("/dev/kfd").exists()


def _without_other_ray(environment: Mapping[str, str]) -> dict[str, str]:
    """Return `environment` without the variables that another Ray or an engine has set in the calling process.

    An engine passes names, for example of sockets, to its ranks in environment variables. A rank's own values are
    overridden by the variables of its Ray node. So the node's environment must not contain the names of another engine.
    """
    other = ("RAY_ADDRESS", "RAY_AUTH_TOKEN_PATH", "RAY_JOB_ID", end_causes.ENGINE, sockets.ENV)
    return {key: value for key, value in environment.items() if key not in other}


def _short_folder(settings: LocalRaySettings) -> Path:
    folder = settings.run_folder / "ray"
    if len(str(folder)) <= 30:
        return folder
    return Path("/tmp") / f"headrace-{os.getuid()}-{settings.instance}"  # noqa: S108 - made with mode 0700, named by us


def _keep_logs(folder: Path, run_folder: Path) -> None:
    """Copy the logs of an ended Ray to `run_folder`/ray-logs and remove Ray's folder.

    Does nothing if Ray's folder is in `run_folder` or has no logs.
    """
    logs = folder / "session_latest" / "logs"
    if folder.parent == run_folder or not logs.exists():
        return
    shutil.rmtree(run_folder / "ray-logs", ignore_errors=True)
    shutil.copytree(logs, run_folder / "ray-logs", symlinks=True, ignore_dangling_symlinks=True)
    shutil.rmtree(folder, ignore_errors=True)
