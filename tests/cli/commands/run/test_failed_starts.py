"""A start that has failed leaves nothing that could end the next start, with the mended file: real Ray, real processes,
a simulated engine."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from cluster.cli.local.run_folder import RunFolder
from cluster.client import Client
from cluster.ray import reaper
from tests.support.checkpoints import build_checkpoint
from tests.support.shell import headrace, until

pytestmark = [pytest.mark.ray, pytest.mark.long]

NAME = "failedstart"
LISTEN = dict.fromkeys(("grpc", "http", "link", "admin", "metrics"), "127.0.0.1:0")


def mended(folder: Path) -> str:
    """Return a configuration that starts."""
    listen = ", ".join(f'{port}: "{address}"' for port, address in LISTEN.items())
    return f"""
api_version: headrace/v1
name: {NAME}
gateway: {{listen: {{{listen}}}}}
store: {{database_url: "sqlite:///{folder / "ledger.db"}"}}
models: [{{name: m, source: "sim://{folder / "model"}"}}]
"""


SOURCE, MODELS = 'source: "sim://{folder}/model"', "\nmodels:"
FAULTS = {
    "folder": ("/model", "/modle", "/modle"),
    "engine setting": (SOURCE, SOURCE.replace('l"', 'l?decode_ms=fast"'), "decode_ms"),
    "hub": (SOURCE, 'source: "hf://nobody/nothing"', "nobody/nothing"),
    "parser": ("name: m,", "name: m, engine: {{tool_call_parser: nobodys}},", "nobodys"),
    "secret": (
        MODELS,
        "\nauth: {{api_keys: {{pepper_file: {folder}/pepper}}, cluster_secret_file: {folder}/model/config.json/secret}}"
        + MODELS,
        "auth.cluster_secret_file",
    ),
    "ledger": (
        '{folder}/ledger.db"}}',
        '{folder}/model/config.json/ledger.db"}}\nauth: {{api_keys: {{pepper_file: {folder}/pepper}}, '
        "cluster_secret_file: {folder}/secret}}",
        "store.database_url",
    ),
    "license": (
        MODELS + " [{{name: m,",
        "\nweights: {{allow: {{licenses: [mit]}}}}" + MODELS + " [{{name: m, license: gpl-3.0,",
        "weights.allow.licenses",
    ),
    "source rule": (MODELS, "\nweights: {{allow: {{sources: ['hf://*']}}}}" + MODELS, "weights.allow.sources"),
    "port": ('grpc: "127.0.0.1:0"', 'grpc: "127.0.0.1:{port}"', "gateway.listen.grpc"),
}
"""For each kind of failure: a text of the configuration, its replacement, and what the error names."""


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """A folder with a model. At the end, what still runs of the cluster is ended."""
    build_checkpoint("llama", tmp_path / "model")
    yield tmp_path
    headrace("down", NAME, "-y")


def write(folder: Path, text: str) -> str:
    """Write the configuration file and return its path."""
    file = folder / "cluster.yaml"
    file.write_text(text)
    return str(file)


def assert_it_starts(folder: Path) -> None:
    """Start the mended cluster, and get an answer."""
    done = headrace("up", "-f", write(folder, mended(folder)), "--detach")
    assert done.returncode == 0, done.stdout + done.stderr
    with Client(RunFolder(NAME).endpoints()["grpc"], timeout_s=60) as client:
        assert client.chat("m", "Hello", max_tokens=3).text


@pytest.mark.parametrize("fault", FAULTS)
def test_a_mended_file_starts(folder: Path, fault: str) -> None:
    """After a failed start, whose error names the fault, `up` with the mended file starts."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        texts = [text.format(folder=folder, port=taken.getsockname()[1]) for text in FAULTS[fault]]
        old, new, named = texts
        assert old in mended(folder)
        done = headrace("up", "-f", write(folder, mended(folder).replace(old, new)), "--detach")
    assert done.returncode, done.stdout
    assert named in done.stderr + done.stdout
    assert_it_starts(folder)


@pytest.mark.parametrize("moment", ["preparing", "controller"])
@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGKILL])
def test_a_start_that_was_ended_is_repeated(folder: Path, end: signal.Signals, moment: str) -> None:
    """After Ctrl-C or SIGKILL in the middle of a start, the next `up` ends what is left, and starts."""
    command = [sys.executable, "-m", "cluster.cli.main", "up", "-f", write(folder, mended(folder))]
    run = RunFolder(NAME)
    with subprocess.Popen(command) as process:
        if moment == "preparing":
            until(run.config_file.exists, "the step that prepares models has begun")
        else:
            until(lambda: "controller" in run.state().get("processes", {}), "the controller has started")
        instance = run.instance()
        process.send_signal(end)
        process.wait(120)
    assert_it_starts(folder)
    assert not instance or reaper.find(instance) == frozenset()


@pytest.mark.parametrize(
    ("part", "named"), [("controller", "the controller ended"), ("raylet", "raylet [exit code=-9]")]
)
def test_a_part_that_ends_fails_the_start(folder: Path, part: str, named: str) -> None:
    """If the controller or a process of Ray ends in the middle of a start, the start fails and names it, and the next
    one works."""
    command = [sys.executable, "-m", "cluster.cli.main", "up", "-f", write(folder, mended(folder))]
    run = RunFolder(NAME)
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        until(lambda: "controller" in run.state().get("processes", {}), "the controller has started")
        processes = run.state()["processes"]
        if part == "raylet":
            of_ray = psutil.Process(processes["ray"]["pid"]).children(recursive=True)
            next(child for child in of_ray if child.name() == "raylet").kill()
        else:
            os.kill(processes[part]["pid"], signal.SIGKILL)
        _, errors = process.communicate(timeout=120)
    assert process.returncode == 1
    assert named in errors
    assert_it_starts(folder)
