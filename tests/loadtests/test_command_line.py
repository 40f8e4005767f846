"""`python -m loadtests` on the command line: a smoke run, wrong arguments, a missing server, and a server that dies."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from pathlib import Path

import pytest

from cluster.process.ports import free_port
from loadtests.children import ROOT
from tests.loadtests.conftest import MODEL, SseServer
from tests.support.cluster import until

pytestmark = pytest.mark.slow


async def _run(*arguments: str) -> tuple[int, str, str]:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "loadtests", *arguments, cwd=ROOT, env={**os.environ, "COLUMNS": "160"},
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    try:
        out, err = await asyncio.wait_for(process.communicate(), 540)
    except TimeoutError:
        process.kill()
        raise
    return process.returncode or 0, out.decode(), err.decode()


@pytest.mark.slow
@pytest.mark.long
async def test_smoke_runs_every_face_and_writes_report_and_plots(tmp_path: Path) -> None:
    """A smoke run answers all calls of each API with equal texts, and writes figures to the JSON file and PNG files."""
    code, out, err = await _run("smoke", "--json", str(tmp_path / "out.json"), "--plot", str(tmp_path / "plots"))
    assert code == 0, out + err
    report = json.loads((tmp_path / "out.json").read_text())
    assert report["complete"]
    names = [arm["name"] for arm in report["arms"]]
    assert names == ["ours StreamChat", "ours HTTP", "ours Session"]
    for arm in report["arms"]:
        for round_ in arm["rounds"]:
            assert (round_["whole_answers"], round_["errors"], round_["short_answers"]) == (24, {}, 0)
            assert len(round_["samples"]) == 24
            assert round_["cpu_s"].keys() == {"gateway", "worker replica"}
    assert report["settings"]["equal texts: ours HTTP and ours StreamChat"] == "48 of 48"
    assert all(figure["value"] > 0 and figure["bound"] is None for figure in report["figures"])
    assert {"cpu", "cores", "memory_gib"} <= report["hardware"].keys()
    assert {"python", "grpcio"} <= report["versions"].keys()
    assert all((tmp_path / "plots" / f"smoke-{name}.png").stat().st_size > 5000 for name in ("ttft", "tpot", "e2e"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--endpoint", "127.0.0.1:1"], "unknown scheme; expected one of grpc://"),
        (["--endpoint", "grpc://nowhere"], "expected grpc://HOST:PORT"),
        (["--endpoint", "http://127.0.0.1:1", "--dataset", "sharegpt"], "unknown dataset 'sharegpt'"),
        (["--endpoint", "http://127.0.0.1:1", "--speed", "2"], "--dataset must be one of"),
        (["--endpoint", "http://127.0.0.1:1", "--concurrency", "1,x"], "expected integers above 0"),
        (["--endpoint", "http://127.0.0.1:1", "--dataset", "mooncake", "--traces", "/nowhere"], "is absent"),
    ],
)
async def test_wrong_words_are_one_clear_line(arguments: list[str], message: str) -> None:
    """Wrong arguments give exit code 2 and one line with the remedy, without a traceback."""
    code, out, err = await _run("endpoint", *arguments)
    assert code == 2
    assert message in " ".join(err.split())
    assert "Traceback" not in out + err


@pytest.mark.parametrize("scheme", ["grpc", "session", "http", "ray"])
async def test_nobody_at_the_endpoint_is_said_at_once(scheme: str) -> None:
    """A missing server is reported with its address before any run begins."""
    address = f"{scheme}://127.0.0.1:{free_port()}"
    code, _, err = await _run("endpoint", "--endpoint", address)
    assert code == 2
    assert f"nobody answers at {address}" in " ".join(err.split())


@pytest.mark.slow
async def test_a_sweep_has_a_round_for_each_concurrency_and_a_plot(sse: SseServer, tmp_path: Path) -> None:
    """A sweep runs one round for each concurrency, and the plot shows throughput against concurrency."""
    code, out, err = await _run(
        "endpoint", "--endpoint", sse.url, "--model", MODEL, "--requests", "12", "--tokens", "8",
        "--concurrency", "1,4", "--slo-ttft-ms", "5000", "--json", str(tmp_path / "o.json"), "--plot", str(tmp_path),
    )  # fmt: skip
    assert code == 0, out + err
    (arm,) = json.loads((tmp_path / "o.json").read_text())["arms"]
    assert [round_["concurrency"] for round_ in arm["rounds"]] == [1, 4]
    assert all(round_["goodput_per_s"] == pytest.approx(round_["requests_per_s"], rel=0.01) for round_ in arm["rounds"])
    assert (tmp_path / "endpoint-throughput.png").stat().st_size > 5000


@pytest.mark.slow
async def test_a_server_that_dies_leaves_a_partial_report(sse: SseServer, tmp_path: Path) -> None:
    """If the server dies, the report keeps the earlier results and states what happened, and the exit code is 1."""
    running = asyncio.create_task(
        _run(
            "endpoint",
            "--endpoint",
            sse.url,
            "--model",
            MODEL,
            "--requests",
            "5000",
            "--tokens",
            "16",
            "--concurrency",
            "8",
            "--json",
            str(tmp_path / "o.json"),
        )
    )
    await until(lambda: sse.server.served > 100, "a hundred calls have been made", 60.0)
    sse.die()
    code, out, _ = await running
    assert code == 1
    assert "this report is partial" in out
    report = json.loads((tmp_path / "o.json").read_text())
    (round_,) = report["arms"][0]["rounds"]
    assert not report["complete"]
    assert "the server died" in round_["problem"]
    assert round_["whole_answers"] >= 80
    assert round_["calls"] < 5000


@pytest.mark.slow
@pytest.mark.thorough
async def test_an_interrupt_writes_the_report_and_leaves_no_process(tmp_path: Path) -> None:
    """After Ctrl-C in the middle of a scenario the gateway and the worker are gone, and the JSON
    records the interrupt.
    """
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "loadtests", "relay", "--only", "ours StreamChat", "--json", str(tmp_path / "o.json"),
        "--logs", str(tmp_path / "logs"), cwd=ROOT, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
        start_new_session=True,
    )  # fmt: skip
    log = tmp_path / "logs" / "ours-worker.log"
    await until(lambda: log.exists() and "link.connected" in log.read_text(), "the worker is linked", 120.0)
    process.send_signal(signal.SIGINT)
    out, _ = await asyncio.wait_for(process.communicate(), 540)
    assert process.returncode == 1
    assert b"interrupted" in out
    assert json.loads((tmp_path / "o.json").read_text())["problems"] == ["interrupted"]
