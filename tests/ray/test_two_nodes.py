"""Test of an external Ray cluster of two nodes in two network namespaces. Headrace reaches the Ray cluster only through
Ray's dashboard, with a token."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from cluster.api.types import ModelState
from cluster.ray import reaper
from cluster.ray.backend import RayAway
from cluster.ray.jobs import JobBackend
from tests.ray.conftest import ENGINE_ENVIRONMENT
from tests.ray.test_engines import same_tokens, two_ranks
from tests.ray.test_serve import controlling, in_state
from tests.support.checkpoints import build_checkpoint
from tests.support.netns import Host, Network, network
from tests.support.serving import open_door

pytestmark = [pytest.mark.ray, pytest.mark.root, pytest.mark.timeout(900)]

GCS_PORT, DASHBOARD_PORT = 6379, 8265  # the namespaces are the test's own


@dataclass(frozen=True)
class TwoNodes:
    """A Ray cluster on two hosts with one logical GPU each."""

    net: Network
    instance: str
    folder: Path
    token_file: Path

    @property
    def dashboard_url(self) -> str:
        """URL of the head's dashboard, as reached over the bridge."""
        return f"http://{self.net.hosts[0].address}:{DASHBOARD_PORT}"


def start_node(host: Host, folder: Path, environment: dict[str, str], *arguments: str) -> None:
    """Run `ray start --block` on a host, without waiting for it. `environment` has a variable by which
    cluster/ray/reaper.py later finds the process to end it."""
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--num-gpus=1"]
    options = [f"--node-ip-address={host.address}", "--disable-usage-stats", "--object-store-memory=134217728"]
    with (folder / f"{host.namespace}.log").open("wb") as log:
        subprocess.Popen(
            host.command(*command, *options, *arguments),
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


@pytest.fixture(scope="module")
def two_nodes() -> Iterator[TwoNodes]:
    """A Ray cluster of a head and a second node, each in a separate namespace."""
    instance = f"two-{uuid.uuid4().hex[:8]}"
    folder = Path(tempfile.mkdtemp(prefix="hr-"))
    token_file = folder / "token"
    token_file.write_text(secrets.token_hex(32))
    environment = {
        **{key: value for key, value in os.environ.items() if not key.startswith("RAY_")},
        **ENGINE_ENVIRONMENT,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        reaper.INSTANCE_ENV: instance,
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": token_file.read_text(),
        "GLOO_SOCKET_IFNAME": "eth0",
        "TMPDIR": str(folder),  # the fork server of Ray's dashboard leaves its folder here when it is killed
    }
    with network(2) as net:
        head, second = net.hosts
        dashboard = (
            f"--dashboard-host={head.address}",
            f"--dashboard-port={DASHBOARD_PORT}",
            "--include-dashboard=true",
        )
        try:
            start_node(
                head,
                folder,
                environment,
                "--head",
                f"--port={GCS_PORT}",
                f"--temp-dir={folder}/ray",
                # No replica is placed on the head. Ray attributes a driver to the head if the driver can see the head's
                # processes.
                "--num-cpus=0",
                *dashboard,
            )
            start_node(second, folder, environment, f"--address={head.address}:{GCS_PORT}", "--num-cpus=8")
            yield TwoNodes(net, instance, folder, token_file)
        finally:
            reaper.end(instance, folder)
            shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.engine
@pytest.mark.long
async def test_one_rank_on_each_node(two_nodes: TwoNodes, tmp_path: Path) -> None:
    """A model with TP 2 that needs two nodes gets the state FAILED and the reason.

    With allow_cross_node_tensor_parallel, each node runs one rank, and the tokens equal the tokens that transformers
    generates.
    """
    folder = build_checkpoint("llama", tmp_path / "llama")
    backend = JobBackend("test", two_nodes.dashboard_url, two_nodes.token_file)
    async with open_door(two_nodes.net.address) as door:
        alone = two_ranks("wide", folder, door.address)
        async with controlling(backend, door) as controller:
            await both_joined(backend)
            controller.models.want([alone])
            entry = await in_state(door, "wide", ModelState.FAILED)
            assert "needs 2 GPUs and 1 CPU on one node, and the largest has 1 GPU" in entry.state_reason
            assert "allow_cross_node_tensor_parallel" in entry.state_reason
            spread = dataclasses.replace(alone.spec, allow_cross_node_tensor_parallel=True)
            controller.models.want([dataclasses.replace(alone, spec=spread)])
            link = await door.worker("wide", 240.0)
            await same_tokens(link, folder)
            ranks = [pid for pid in reaper.find(two_nodes.instance, two_nodes.folder) if is_rank(pid)]
            assert [sum(host.holds(pid) for pid in ranks) for host in two_nodes.net.hosts] == [1, 1]


async def both_joined(backend: JobBackend) -> None:
    """Wait until both nodes have joined. The dashboard may not answer at first."""
    deadline = time.monotonic() + 240.0
    while time.monotonic() < deadline:
        with contextlib.suppress(RayAway):
            if sum("GPU" in node for node in (await backend.observe()).nodes) == 2:
                return
        await asyncio.sleep(0.2)
    raise AssertionError("timed out waiting until both nodes have joined")


def is_rank(pid: int) -> bool:
    """Return whether a process is one of vLLM's ranks."""
    try:
        return "RayWorker" in " ".join(psutil.Process(pid).cmdline())
    except psutil.NoSuchProcess:
        return False
