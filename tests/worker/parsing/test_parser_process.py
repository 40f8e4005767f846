"""The parser process, forked by the fork server or started as a new interpreter, and the detection of its hangs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.worker.engine.processes import fork_server
from cluster.worker.parsing.hangs import HangWatch, cpu_seconds
from cluster.worker.parsing.progress import NONE, ParserProgress, new_memory
from tests.worker.parsing.formats import FORMATS

OWNER = """
import asyncio, json, os, sys
from functools import partial
from pathlib import Path
from cluster.worker.engine.processes import fork_server
from cluster.worker.parsing.kit import KitSettings
from cluster.worker.parsing.output_parser import OutputParser
from cluster.worker.parsing.parser_process import start_process
from cluster.worker.parsing.port import ParserNames
from tests.worker.parsing.formats import FORMATS, encode
from tests.worker.parsing.test_output_parser import outputs_of, parts_of, request_of, running

async def main(folder):
    fork_server.PRELOAD = "vllm.parser"
    fork_server.start()
    form = FORMATS[0]
    names = ParserNames(form.tools, form.reasoning)
    hosts = []
    def start():
        hosts.append(start_process(KitSettings(str(folder), names)))
        return hosts[-1]
    parser = OutputParser(names, start)
    async with running(parser):
        await parser.open(request_of(form, "r", [1]))
        for output in outputs_of("r", encode(folder, form.output), 7):
            parser.divert([output])
        got = []
        while not got or got[-1].finish is None:
            got += await parser.parsed()
        print(json.dumps([hosts[0].pid, fork_server.is_running(), parts_of(got)]), flush=True)
        sys.stdin.read()

asyncio.run(main(Path(sys.argv[1])))
"""


@pytest.fixture(params=["fork-server", pytest.param("spawn", marks=pytest.mark.long)])
def owner(request: pytest.FixtureRequest, folder: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A process that has started a parser process, and the way in which it was started."""
    environment = {**os.environ, fork_server.START: request.param, "PYTHONPATH": os.getcwd()}
    command = [sys.executable, "-c", OWNER, str(folder)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        yield process, request.param
        process.kill()


@pytest.mark.engine
@pytest.mark.slow
def test_a_parser_process_parses_and_ends_with_its_owner(owner: tuple[subprocess.Popen[str], str]) -> None:
    """A parser process parses an output, and ends when the process that started it is killed. Both hold for a parser
    process that a fork server has forked, and for one that was spawned."""
    process, way = owner
    assert process.stdout is not None
    pid, forked, parts = json.loads(process.stdout.readline())
    assert forked is (way == "fork-server")
    assert [part[0] for part in parts] == [1, 3, 4, 3, 4]
    assert "find_hotel" in FORMATS[0].output
    child = psutil.Process(pid)
    process.kill()
    child.wait(20)


@given(st.lists(st.integers(0, 1 << 40), max_size=9))
def test_progress_is_the_last_record(sessions: list[int]) -> None:
    """The reader gets the session that was recorded last, and a count that changes with each record."""
    memory = new_memory()
    reader, writer = ParserProgress(os.dup(memory)), ParserProgress(memory)
    counts = set()
    for session in sessions:
        writer.record(session)
        assert reader.read()[0] == session
        counts.add(reader.read()[1])
    assert len(counts) == len(sessions)


@pytest.mark.parametrize(
    ("readings", "hung"),
    [
        ([((3, 1), 0.0, 0.0), ((3, 1), 1.9, 5.0)], NONE),  # slow on a busy machine: little CPU time
        ([((3, 1), 0.0, 0.0), ((3, 1), 2.1, 5.0)], 3),
        ([((3, 1), 0.0, 0.0), ((3, 1), 0.0, 20.1)], 3),  # asleep
        ([((3, 1), 0.0, 0.0), ((3, 2), 9.0, 30.0), ((3, 2), 9.1, 31.0)], NONE),  # the next message of the session
        ([((0, 1), 0.0, 0.0), ((0, 1), 9.0, 90.0)], NONE),  # idle
    ],
)
def test_work_on_one_message_hangs_by_cpu_time_or_by_wall_time(
    readings: list[tuple[tuple[int, int], float, float]], hung: int
) -> None:
    """A session counts as hung if one of its messages takes too much CPU time, or a much longer wall time."""
    now = iter(readings)
    current = readings[0]
    watch = HangWatch(lambda: current[0], lambda: current[1])
    found = NONE
    for current in now:
        found = watch.hung(current[2])
    assert found == hung


def test_the_cpu_time_of_a_process_grows() -> None:
    """The measured CPU time of this process grows with its work. The CPU time of an unknown process is 0."""
    before = cpu_seconds(os.getpid())
    sum(range(3_000_000))
    assert cpu_seconds(os.getpid()) > before
    assert cpu_seconds(None) == 0.0
