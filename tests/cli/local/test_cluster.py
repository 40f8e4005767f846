"""Tests of a local cluster with real processes, on a Ray cluster that does not answer."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from contextlib import suppress

import psutil
import pytest

from cluster.cli.local.children import StartFailed
from cluster.cli.local.cluster import LocalCluster
from cluster.cli.local.ports import choose_ports, split
from cluster.cli.local.run_folder import RunFolder
from cluster.cli.local.step_lines import StepLine
from cluster.config.document import parse
from cluster.process.private_files import make_private_folder
from tests.support.serving import eventually

pytestmark = pytest.mark.slow

CONFIG = """
api_version: headrace/v1
name: local
gateway:
  processes: 2
  listen:
    {grpc: "127.0.0.1:0", http: "127.0.0.1:0", link: "127.0.0.1:0", admin: "127.0.0.1:0", metrics: "127.0.0.1:0"}
ray: [{name: away, dashboard_url: "http://127.0.0.1:9"}]
models: []
"""


def local(reports: list[str], models: str = "[]") -> LocalCluster:
    """Return a local cluster with two gateway processes and no Ray process. The cluster appends its progress messages
    to `reports`."""
    run = RunFolder("local")
    make_private_folder(run.path)
    return LocalCluster(choose_ports(parse(CONFIG.replace("models: []", f"models: {models}"))), run, reports.append)


async def test_a_lost_gateway_is_started_again_and_nothing_is_left() -> None:
    """A killed gateway is replaced at the same address, and a stop ends all processes of the cluster.

    state.json lists all processes.
    """
    reports: list[str] = []
    cluster = local(reports)
    step = StepLine("", "cluster")
    await cluster.start(step)
    supervising = asyncio.create_task(cluster.supervise())
    state, endpoints = cluster.run.state(), cluster.endpoints
    assert set(state["processes"]) == {"gateway", "gateway-1", "controller"}
    assert (state["endpoints"], len(state["siblings"]), state["ray_folder"]) == (endpoints, 1, "")
    lost = int(state["processes"]["gateway"]["pid"])
    os.kill(lost, signal.SIGKILL)

    def replacement() -> int:
        return int(cluster.run.state()["processes"].get("gateway", {"pid": lost})["pid"])

    await eventually(lambda: replacement() != lost, "it is started again", 240)
    assert cluster.endpoints == endpoints
    assert any(report.startswith("gateway ended (signal SIGKILL)") for report in reports)
    assert await cluster.wait_for_models(step) == []
    supervising.cancel()
    with suppress(asyncio.CancelledError):
        await supervising
    pids = [int(process["pid"]) for process in cluster.run.state()["processes"].values()]
    assert await cluster.stop(step) == 0
    assert not any(psutil.pid_exists(pid) for pid in pids)
    assert cluster.run.state() == {}


async def test_a_gateway_that_cannot_start_is_named() -> None:
    """If a gateway process cannot start, the error names the process and quotes the end of its log."""
    cluster = local([])
    with (
        socket.create_server(split(cluster.config.gateway.listen.link)),
        pytest.raises(StartFailed, match=r"the gateway ended while starting:\n    .*in use"),
    ):
        await cluster.start(StepLine("", "cluster"))
    assert await cluster.stop(StepLine("", "stopping")) == 0


async def test_the_end_of_a_part_ends_the_start() -> None:
    """If the controller ends while the models are loading, the start fails and names the controller and its log."""
    cluster = local([], "[{name: m, source: /nowhere}]")
    step = StepLine("", "cluster")
    await cluster.start(step)
    waiting = asyncio.create_task(cluster.wait_for_models(step))
    os.kill(int(cluster.run.state()["processes"]["controller"]["pid"]), signal.SIGKILL)
    with pytest.raises(StartFailed, match=r"the controller ended while the models were loading(.|\n)*controller.log"):
        await waiting
    assert await cluster.stop(step) == 0
