"""A Ray whose head can be lost and come back: Valkey keeps its tables, a head without GPUs, a node that has them.

Each part is tagged for itself (reaper.INSTANCE_ENV), so that the head's processes, Serve's controller among them, end
without the node's.
"""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from cluster.cli import doctor
from cluster.rayserve import reaper
from cluster.rayserve.local import free_ports

UP_S = 60.0
GCS_AWAY_S = 900
"""How long the node and all that runs there wait for a head that is away (Ray's own default is 60 s)."""


@dataclass
class LostAndFound:
    """`start` all; then `lose_head` and `find_head` as often as wanted; `end` what is left."""

    environment: Mapping[str, str]
    name: str = field(default_factory=lambda: uuid.uuid4().hex[:8])
    folder: Path = field(default_factory=lambda: Path(tempfile.mkdtemp(prefix="hr-")))
    token: str = field(default_factory=lambda: secrets.token_hex(32))
    keeps_tables: bool = True
    """Whether the head keeps its tables in Valkey, which is what Ray calls GCS fault tolerance."""
    _valkey: subprocess.Popen[bytes] | None = None
    _ports: list[int] = field(default_factory=lambda: free_ports(6))

    @property
    def address(self) -> str:
        """The head's, the same after its loss."""
        return f"{own_address()}:{self._ports[0]}"

    def tag(self, part: str) -> str:
        """What marks the processes of `head` or `node`."""
        return f"{part}-{self.name}"

    def environment_of(self, part: str) -> dict[str, str]:
        """Of a part's processes, or of a driver's, which are `own`."""
        kept = {"RAY_REDIS_ADDRESS": f"127.0.0.1:{self._ports[5]}"} if self.keeps_tables and part == "head" else {}
        return {
            **self.environment,
            **kept,
            reaper.INSTANCE_ENV: self.tag(part),
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": self.token,
            "RAY_gcs_rpc_server_reconnect_timeout_s": str(GCS_AWAY_S),
        }

    def start(self) -> None:
        """All three, each once the one before it serves."""
        self.start_valkey()
        self.find_head()
        self._ray("node", f"--address={self.address}", "--num-cpus=16", "--num-gpus=16")

    def start_valkey(self) -> None:
        """An empty one. Skips the test where there is no Valkey."""
        server = doctor.find_tool("valkey-server") or doctor.find_tool("redis-server")
        if server is None:
            lack = doctor.check_valkey()
            pytest.skip(f"{lack.name}: {lack.missing}; {lack.remedy}")
        words = ("--port", str(self._ports[5]), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no")
        quiet = subprocess.DEVNULL
        self._valkey = subprocess.Popen([server, *words], cwd=self.folder, stdin=quiet, stdout=quiet, stderr=quiet)
        self._until_open(self._ports[5], "Valkey")

    def lose_valkey(self) -> None:
        """SIGKILL: what it held is lost."""
        if self._valkey is not None:
            self._valkey.send_signal(signal.SIGKILL)
            self._valkey.wait()
            self._valkey = None

    def lose_head(self) -> None:
        """SIGKILL to every process of the head."""
        reaper.end(self.tag("head"), self.folder / "head", grace_s=0.0)

    def find_head(self) -> None:
        """Start it, where it was before and with what Valkey has of it."""
        gcs, client, dashboard, *_ = self._ports
        words = [f"--port={gcs}", f"--ray-client-server-port={client}", f"--dashboard-port={dashboard}"]
        self._ray("head", "--head", *words, "--include-dashboard=false", "--num-cpus=0", "--num-gpus=0")
        self._until_open(gcs, "the head")

    def end(self) -> None:
        """Everything, files too."""
        for part in ("head", "node", "own"):
            reaper.end(self.tag(part), self.folder, grace_s=0.0)
        self.lose_valkey()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _ray(self, part: str, *arguments: str) -> None:
        """`ray start --block`; it is ended by its tag."""
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", *arguments]
        command += ["--disable-usage-stats", "--object-store-memory=134217728", "--dashboard-agent-listen-port=0"]
        command += ["--min-worker-port=0", "--max-worker-port=0", f"--temp-dir={self.folder / part}"]
        (self.folder / part).mkdir(exist_ok=True)
        with (self.folder / f"{part}.log").open("ab") as log:
            subprocess.Popen(
                command,
                env=_without_ray() | self.environment_of(part),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def _until_open(self, port: int, what: str) -> None:
        deadline = time.monotonic() + UP_S
        while time.monotonic() < deadline:
            with socket.socket() as probe:
                probe.settimeout(1.0)
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    return
            time.sleep(0.05)
        raise AssertionError(f"{what} does not listen after {UP_S:g} s")


def own_address() -> str:
    """What Ray takes for this machine's."""
    import ray.util

    return str(ray.util.get_node_ip_address())


def _without_ray() -> dict[str, str]:
    return {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
