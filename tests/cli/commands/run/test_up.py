"""The command line runs a whole local cluster, with real Ray, two gateways, a controller and a simulated engine."""

from __future__ import annotations

import itertools
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from cluster.cli.local.run_folder import RunFolder
from cluster.client import Client
from cluster.ray import reaper
from tests.support.checkpoints import build_checkpoint
from tests.support.cpu import time_within
from tests.support.shell import headrace, status, until

pytestmark = pytest.mark.ray

CONFIG = """
api_version: headrace/v1
name: {name}
gateway:
  processes: 2
  listen:
    {{grpc: "127.0.0.1:0", http: "127.0.0.1:0", link: "127.0.0.1:0", admin: "127.0.0.1:0", metrics: "127.0.0.1:0"}}
models: [{{name: sim, aliases: [default], source: "{source}"}}]
"""
DIES_AFTER = 200
"""Number of steps after which the simulated engine dies: more steps than all other tests need from one engine."""


@dataclass
class Up:
    """A running local cluster, with the output of `up`."""

    name: str
    file: Path
    output: str
    run: RunFolder
    instance: str

    def process(self, part: str) -> int:
        """Return the process id of a part of the cluster, from state.json."""
        return int(self.run.state()["processes"][part]["pid"])

    def ask(self) -> str:
        """Return one answer of the model. The client retries failed calls."""
        with Client(self.run.endpoints()["grpc"], timeout_s=30) as client:
            return client.chat("default", "Hello", max_tokens=5, temperature=0.0).text


@pytest.fixture(scope="module")
def up(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Up]:
    """Provide a cluster that was started with --detach. `down` stops the cluster after all tests of the module."""
    folder = tmp_path_factory.mktemp("up")
    before = os.environ.get("HEADRACE_CACHE_DIR")
    os.environ["HEADRACE_CACHE_DIR"] = str(folder / "cache")
    checkpoint = build_checkpoint("llama", folder / "model")
    file = folder / "cluster.yaml"
    file.write_text(CONFIG.format(name="uptest", source=f"sim://{checkpoint}?fault=die@step:{DIES_AFTER}"))
    try:
        done = headrace("up", "-f", str(file), "--detach")
        assert done.returncode == 0, done.stdout + done.stderr
        run = RunFolder("uptest")
        yield Up("uptest", file, done.stdout, run, run.instance())
    finally:
        headrace("down", "uptest")
        for link in (folder / "cache" / "run").glob("*/ray-session"):
            shutil.rmtree(link.readlink(), ignore_errors=True)
        if before is None:
            del os.environ["HEADRACE_CACHE_DIR"]
        else:
            os.environ["HEADRACE_CACHE_DIR"] = before


@pytest.fixture(autouse=True)
def cache() -> None:
    """Override the fixture that gives each test a new cache folder. All tests of this module use one cache folder."""


def test_it_says_ready_and_answers(up: Up) -> None:
    """The output of `up` ends with the endpoints and the command that stops the cluster, and the model answers."""
    ready = next(line for line in up.output.splitlines() if line.startswith("ready"))
    assert up.run.endpoints()["grpc"].replace("127.0.0.1", "localhost") in ready
    assert "down uptest" in up.output.splitlines()[-1]
    assert up.ask()


def test_status_finds_it(up: Up) -> None:
    """`status --json` without an address shows the local cluster's endpoints, the ready model and the worker."""
    shown = status()
    assert shown["endpoints"] == up.run.endpoints()
    assert [(model["name"], model["state"]) for model in shown["models"]] == [("sim", "READY")]
    assert [worker["model"] for worker in shown["workers"]] == ["sim"]


def test_no_process_of_ray_idles(up: Up) -> None:
    """Ray has started a process for the replica, and none that nothing uses."""
    commands = [
        " ".join(process.info["cmdline"])
        for process in psutil.process_iter(["cmdline", "environ"])
        if process.info["cmdline"] and (process.info["environ"] or {}).get(reaper.INSTANCE_ENV) == up.instance
    ]
    assert any(command.startswith("ray::ServeReplica") for command in commands)
    for unused in ("ray::IDLE", "log_monitor"):
        assert not any(unused in command for command in commands), unused


def test_both_gateways_are_linked(up: Up) -> None:
    """The worker and the controller link to both gateway processes, given only the address of the first process."""

    def linked() -> list[tuple[int, int]]:
        return [(row["workers"], row["controllers"]) for row in status()["gateways"]]

    until(lambda: linked() == [(1, 1), (1, 1)], "both have both links")


def test_a_second_up_is_refused(up: Up) -> None:
    """A second `up` with the same name is refused, and the first cluster continues to serve calls."""
    done = headrace("up", "-f", str(up.file), "--detach")
    assert done.returncode == 1
    assert "already up" in done.stderr
    assert up.ask()


@pytest.mark.thorough
@pytest.mark.parametrize("part", ["gateway", pytest.param("gateway-1", marks=pytest.mark.long), "controller"])
def test_a_killed_part_comes_back(up: Up, part: str) -> None:
    """A killed part of the cluster is restarted, the restart is reported, and callers are served again."""
    before = up.process(part)
    os.kill(before, signal.SIGKILL)
    until(lambda: up.process(part) not in (before, None) and psutil.pid_exists(up.process(part)), f"a new {part}")
    assert f"{part} ended (signal SIGKILL)" in up.run.log_file("up").read_text()
    assert up.ask()


def _state_reason() -> str:
    (model,) = status()["models"]
    return str(model["state_reason"])


def test_the_end_of_an_engine_is_said(up: Up) -> None:
    """`up`, `status` and the catalog report that an engine has ended, with the reason.

    A replacement replica resumes the running call.
    """
    with Client(up.run.endpoints()["grpc"], timeout_s=60) as client:
        client.chat("default", "Hello", max_tokens=DIES_AFTER, temperature=0.0, ignore_eos=True)
    why = "sim is .*: a replica's engine ended at .* UTC: .*die@step"
    until(lambda: re.search(why, up.run.log_file("up").read_text()), "`up` says it")
    until(lambda: "die@step" in _state_reason(), "`status` says it, once the catalog knows of the new replica")
    assert "a replica's engine" in headrace("status").stdout


@pytest.mark.thorough
@pytest.mark.parametrize("end", [pytest.param(signal.SIGTERM, marks=pytest.mark.long), signal.SIGKILL])
def test_a_lost_ray_starts_afresh(up: Up, end: signal.Signals) -> None:
    """After Ray's head has ended, a new Ray is started, and the same gateway process serves the model again.

    The engines end together with Ray's head. After SIGTERM, Ray waits until all replicas have ended, for at most
    drain_timeout_s.
    """
    before, gateway = up.process("ray"), up.process("gateway")
    lost = up.run.log_file("up").read_text().count("ray ended")
    os.kill(before, end)
    until(lambda: up.run.log_file("up").read_text().count("ray ended") > lost, "the loss is reported")
    until(lambda: up.process("ray") != before, "a new Ray")
    until(lambda: status()["workers"], "its worker")
    assert up.ask()
    assert up.process("gateway") == gateway


def test_down_leaves_nothing(up: Up) -> None:
    """`down` ends every process of the cluster and no other process, and the cluster's name can be used again."""
    admin = up.run.endpoints()["admin"]
    with subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE) as foreign:
        assert reaper.find(up.instance)
        done = headrace("down")
        assert done.returncode == 0, done.stderr
        assert reaper.find(up.instance) == frozenset()
        assert foreign.poll() is None
        foreign.communicate()
    assert RunFolder.known() == []
    assert headrace("status", "--admin", admin).returncode == 3


@pytest.mark.thorough
@pytest.mark.parametrize("end", [pytest.param(signal.SIGINT, marks=pytest.mark.long), signal.SIGKILL])
def test_the_end_of_a_foreground_cluster(up: Up, end: signal.Signals) -> None:
    """Ctrl-C ends all processes of a foreground cluster within seconds.

    If `up` was killed with SIGKILL, `down` ends the processes that are left over.
    """
    name = f"end-{end.name.lower()}"
    file = up.file.with_name(f"{name}.yaml")
    file.write_text(CONFIG.format(name=name, source="sim://").split("models:")[0] + "models: []\n")
    command = [sys.executable, "-m", "cluster.cli.main", "up", "-f", str(file)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        output = list(itertools.takewhile(lambda line: "stops everything" not in line, process.stdout))
        assert any(line.startswith("ready") for line in output), output
        run = RunFolder(name)
        instance = run.instance()
        assert reaper.find(instance)
        with time_within(15.0):
            process.send_signal(end)
            process.wait(120)
            rest = process.stdout.read() if end is signal.SIGINT else ""
            if end is signal.SIGINT:
                assert process.returncode == 0, rest
                assert "no process left" in rest
            else:
                assert reaper.find(instance)
                assert headrace("down", name).returncode == 0
    assert reaper.find(instance) == frozenset()
    assert run.state() == {}
