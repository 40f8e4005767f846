"""A Ray whose head can be lost and restarted. Valkey keeps the head's tables, and the GPUs are on another host.

There are two hosts in network namespaces (which needs root), and Valkey beside the gateway. All processes on the head's
host end with the head, including Serve's controller.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from cluster.cli.commands import doctor
from cluster.process.ports import free_ports
from tests.support.netns import Host, Network, network

GCS_PORT, DASHBOARD_PORT = 6379, 8265  # default ports, since the namespaces are separate
UP_S = 180.0
OWN_PROCESSES = ("unshare", "--pid", "--fork", "--kill-child", "--mount-proc")
"""Command that gives a process PID namespaces as in pods. An engine looks for its Ray node among the visible processes,
and would find the head. A head that sees the processes of another node assumes that the head already runs.
"""
GCS_AWAY_S = 900
"""Time in seconds for which the node and the node's processes wait for a head that is away (Ray's
own default is 60 s).
"""
SUPERVISED = ("bash", "-c", 'for start in 1 2 3; do "$@" && break; done', "supervised")
"""Runs a command again if it fails."""


@dataclass
class HeadAndNode:
    """A head without GPUs, a node with logical GPUs, and a Valkey."""

    net: Network
    folder: Path
    token_file: Path
    environment: Mapping[str, str]
    gcs_away_s: int = GCS_AWAY_S
    _valkey: subprocess.Popen[bytes] | None = None
    _valkey_port: int = 0

    @property
    def head(self) -> Host:
        """Host on which the head runs."""
        return self.net.hosts[0]

    @property
    def node(self) -> Host:
        """Host on which the replicas run."""
        return self.net.hosts[1]

    @property
    def dashboard_url(self) -> str:
        """URL of the head's dashboard, at the head's address on the network bridge of the test."""
        return f"http://{self.head.address}:{DASHBOARD_PORT}"

    def start(self) -> None:
        """Start Valkey, the head and the node. Each start waits until the previous process listens."""
        self.start_valkey()
        self.find_head()
        self._ray(self.node, f"--address={self.head.address}:{GCS_PORT}", "--num-cpus=16", "--num-gpus=16")

    def start_valkey(self) -> None:
        """Start an empty Valkey. Skips the test if Valkey is not installed."""
        server = doctor.find_tool("valkey-server") or doctor.find_tool("redis-server")
        if server is None:
            pytest.skip(doctor.missing_reason("valkey-server"))
        self._valkey_port = self._valkey_port or free_ports(1)[0]
        words = ["--port", str(self._valkey_port), "--bind", self.net.address, "--protected-mode", "no"]
        words += ["--save", "", "--appendonly", "no"]
        quiet = subprocess.DEVNULL
        self._valkey = subprocess.Popen([server, *words], cwd=self.folder, stdin=quiet, stdout=quiet, stderr=quiet)
        _until_open(self.net.address, self._valkey_port, "Valkey")

    def lose_valkey(self) -> None:
        """Kill Valkey. The data in Valkey is lost."""
        if self._valkey is not None:
            self._valkey.kill()
            self._valkey.wait()
            self._valkey = None

    def lose_head(self) -> None:
        """Kill every process on the host of the head."""
        _end(self.head)

    def find_head(self) -> None:
        """Start the head on its host. After a loss, the head reads its earlier data from Valkey.

        A head that ends by itself is started again, as by a supervisor. On a busy machine this happens if its dashboard
        misses a deadline.
        """
        words = ["--head", f"--port={GCS_PORT}", f"--dashboard-host={self.head.address}", "--include-dashboard=true"]
        self._ray(self.head, *words, f"--dashboard-port={DASHBOARD_PORT}", "--num-cpus=8", "--num-gpus=0")
        _until_open(self.head.address, GCS_PORT, "the head")

    def end(self) -> None:
        """End all processes of the head, the node and Valkey."""
        for host in self.net.hosts:
            _end(host)
        self.lose_valkey()

    def _ray(self, host: Host, *arguments: str) -> None:
        """Run `ray start --block` on a host."""
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", *arguments]
        command += [f"--node-ip-address={host.address}", "--disable-usage-stats", "--object-store-memory=134217728"]
        if host is self.head:
            command = [*SUPERVISED, *command, f"--temp-dir={self.folder}/ray"]
        environment = {
            **{key: value for key, value in os.environ.items() if not key.startswith("RAY_")},
            **self.environment,
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": self.token_file.read_text(),
            "RAY_gcs_rpc_server_reconnect_timeout_s": str(self.gcs_away_s),
            "GLOO_SOCKET_IFNAME": "eth0",
            "TMPDIR": str(self.folder),  # Ray's dashboard forks from a server whose folder remains when it is killed
        }
        if host is self.head:
            environment["RAY_REDIS_ADDRESS"] = f"{self.net.address}:{self._valkey_port}"
        with (self.folder / f"{host.namespace}.log").open("ab") as log:
            subprocess.Popen(
                host.command(*OWN_PROCESSES, *command),
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )


def _end(host: Host) -> None:
    """Kill all processes on a host, and wait until no process is left."""
    deadline = time.monotonic() + 60.0
    while pids := [pid for pid in _pids() if _on(host, pid)]:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if time.monotonic() > deadline:
            raise AssertionError(f"{len(pids)} processes of {host.namespace} do not end")
        time.sleep(0.01)


def _pids() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]


def _on(host: Host, pid: int) -> bool:
    """Return whether a process runs on a host. False for a zombie process, which has no namespace."""
    try:
        return host.holds(pid)
    except OSError:
        return False


def _until_open(address: str, port: int, what: str) -> None:
    deadline = time.monotonic() + UP_S
    while time.monotonic() < deadline:
        with socket.socket() as probe:
            probe.settimeout(1.0)
            if probe.connect_ex((address, port)) == 0:
                return
        time.sleep(0.05)
    raise AssertionError(f"{what} does not listen after {UP_S:g} s")


@contextmanager
def head_and_node(environment: Mapping[str, str], gcs_away_s: int = GCS_AWAY_S) -> Iterator[HeadAndNode]:
    """Start Valkey, the head and the node, and remove them at the end.

    `environment`: variables for the replicas, in addition to Ray's own.
    """
    folder = Path(tempfile.mkdtemp(prefix="hr-"))
    (folder / "token").write_text(secrets.token_hex(32))
    try:
        with network(2) as net:
            made = HeadAndNode(net, folder, folder / "token", environment, gcs_away_s)
            try:
                made.start()
                yield made
            finally:
                made.end()
    finally:
        shutil.rmtree(folder, ignore_errors=True)
