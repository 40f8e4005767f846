"""The watchdog ends the engine's processes soon after their owner is killed, and leaves no shared memory."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import signal
import sys
import time
import uuid
from asyncio.subprocess import PIPE, Process
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from cluster.worker.engine.processes import watchdog
from tests.support.shared_memory import blocks, left_blocks, named_blocks
from tests.worker.engine.contract import Driver, Subject, request

TAG = "HEADRACE_INSTANCE"
GONE_WITHIN_S = 60.0


def tagged(tag: str) -> list[psutil.Process]:
    """Return every live process that has the tag in its environment."""
    processes = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(TAG) == tag and process.status() != psutil.STATUS_ZOMBIE:
                processes.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return processes


async def until(holds: Callable[[], bool], within_s: float) -> float:
    """Poll until the condition `holds` is true; return the seconds that passed. Fails after `within_s` seconds."""
    begin = time.monotonic()
    while not holds():
        assert time.monotonic() - begin < within_s, "did not come about in time"
        await asyncio.sleep(0.05)
    return time.monotonic() - begin


async def held_engine(folder: Path, tensor_parallel_size: int, tag: str) -> tuple[Process, str]:
    """Start a program that runs a real engine; return the process and the line that it prints when it is ready. `tag`:
    value of the environment variable TAG, by which the processes of this engine are found."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "tests.worker.engine.hold_engine",
        str(folder),
        str(tensor_parallel_size),
        stdout=PIPE,
        env={**os.environ, TAG: tag},
    )
    assert process.stdout is not None
    while line := (await process.stdout.readline()).decode():
        if line.startswith("ready"):
            return process, line
    raise AssertionError("the engine did not come up")


@pytest.mark.engine
@pytest.mark.parametrize("tensor_parallel_size", [1, pytest.param(2, marks=pytest.mark.long)])
@pytest.mark.thorough
async def test_nothing_is_left_when_the_owner_is_killed(
    llama_folder: Path, fast_subject: Subject, tensor_parallel_size: int
) -> None:
    """When the owner of an engine is killed by SIGKILL, the engine's processes end and leave no shared memory. Before
    the kill, an engine with tensor_parallel_size 2 gives the same tokens as one with 1."""
    (expected,) = await Driver(fast_subject).run(request(fast_subject.prompt(1), max_tokens=8))
    tag, before = uuid.uuid4().hex, blocks()
    owner, line = await held_engine(llama_folder, tensor_parallel_size, tag)
    try:
        name = line.split()[1]
        assert (name.startswith("float32-"), name.endswith(f"-tp{tensor_parallel_size}-pp1")) == (True, True)
        assert tuple(map(int, line.split()[2:])) == expected.token_ids
        shared = [_shared(process.pid) for process in tagged(tag)]
        ranks = 0 if tensor_parallel_size == 1 else tensor_parallel_size  # a single rank runs in the core
        if ranks:
            assert sum(map(bool, shared)) >= 1 + ranks, "core and ranks have shared memory mapped"
        else:
            assert not any(shared), "a core that computes by itself shares nothing"
        names = [named_blocks(process.pid) for process in tagged(tag)]
        assert not set().union(*names), "of which no name is left once the engine is up"
        assert len(tagged(tag)) >= 2 + ranks
        owner.send_signal(signal.SIGKILL)
        await owner.wait()
        await until(lambda: not tagged(tag), GONE_WITHIN_S)
        assert not left_blocks(before)
    finally:
        for process in tagged(tag):
            process.kill()


def _shared(pid: int) -> int:
    """Return the number of shared memory blocks that a process maps and whose names are already removed."""
    return sum("/dev/shm/psm_" in line and line.endswith(" (deleted)") for line in _maps(pid))


def _maps(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/maps").read_text().splitlines()


async def test_only_the_engines_names_are_forgotten() -> None:
    """`forget_names` removes the names of the shared memory of new child processes. The shared memory of a child that
    existed before the engine keeps its name, even if the child created the memory later."""
    code = (
        "from multiprocessing.shared_memory import SharedMemory as S; input(); block = S(create=True, size=8)"
        "; print(block.name, flush=True); input(); block.close(); block.unlink()"
    )

    async def child() -> Process:
        return await asyncio.create_subprocess_exec(sys.executable, "-c", code, stdin=PIPE, stdout=PIPE, stderr=PIPE)

    async def block(process: Process) -> str:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(b"\n")
        return (await process.stdout.readline()).decode().strip()

    stranger = await child()
    before = watchdog.children()
    ours = await child()
    theirs, own = await block(stranger), await block(ours)
    assert {theirs, own} <= blocks()
    watchdog.forget_names(before)
    assert theirs in blocks()
    assert own not in blocks()
    await stranger.communicate(b"\n")
    await ours.communicate(b"\n")
    assert theirs not in blocks()


LOCKS = """
import multiprocessing
from cluster.worker.engine.vllm import repairs
repairs._free_semaphores_quietly()
if __name__ == "__main__":
    lock = multiprocessing.get_context("spawn").Lock()
    print(lock._semlock.name, flush=True)
    input()
    print(lock.acquire(timeout=60), flush=True)
"""


async def test_only_the_engines_semaphores_are_forgotten(tmp_path: Path) -> None:
    """`forget_names` removes the name of a new child's lock from /dev/shm, and the lock still works. The locks of this
    process and of an earlier child keep their names."""
    program = tmp_path / "locks.py"
    program.write_text(LOCKS)

    async def child() -> tuple[Process, str]:
        process = await asyncio.create_subprocess_exec(
            sys.executable, program, stdin=PIPE, stdout=PIPE, stderr=PIPE, env={**os.environ, "PYTHONPATH": os.getcwd()}
        )
        assert process.stdout is not None
        return process, f"sem.{(await process.stdout.readline()).decode().strip().lstrip('/')}"

    kept = multiprocessing.get_context("spawn").Lock()
    kept_name = f"sem.{kept._semlock.name.lstrip('/')}"  # type: ignore[attr-defined]
    stranger, theirs = await child()
    before = watchdog.children()
    ours, own = await child()
    assert watchdog.semaphores({ours.pid}) == {own}
    watchdog.forget_names(before)
    assert own not in os.listdir("/dev/shm")
    assert {kept_name, theirs} <= set(os.listdir("/dev/shm"))
    for process in (stranger, ours):
        assert await process.communicate(b"\n") == (b"True\n", b""), "the lock works, and its clean-up is quiet"
    assert theirs not in os.listdir("/dev/shm")


def test_a_mark_names_one_process_for_ever() -> None:
    """A mark identifies a process by its pid, start time and boot. `alive` returns True for the mark of a running
    process, False if the start time differs, and None (unknown) if the boot differs."""
    own = watchdog.mark(os.getpid())
    assert watchdog.alive(own) is True
    pid, start, here = own.split("@")
    assert watchdog.alive(f"{pid}@{int(start) - 1}@{here}") is False
    assert watchdog.alive(f"{pid}@{start}@another-boot/{here}") is None
    assert watchdog.alive("") is None
    assert watchdog.alive("nonsense") is None


async def test_a_zombie_counts_as_gone() -> None:
    """A killed process that its parent has not reaped counts as gone."""
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", "input()", stdin=PIPE)
    mark = watchdog.mark(process.pid)
    assert watchdog.alive(mark) is True
    process.kill()
    await until(lambda: watchdog.alive(mark) is False, 60.0)
    await process.wait()
    assert watchdog.alive(mark) is False


async def test_a_process_that_watches_ends_with_its_owner() -> None:
    """If the environment of a process contains the mark of an owner process, the process ends itself when the owner is
    gone. A process without a mark runs on."""
    owner = await asyncio.create_subprocess_exec(sys.executable, "-c", "input()", stdin=PIPE)
    code = "from cluster.worker.engine.processes import watchdog; watchdog.watch(); print('up', flush=True); input()"
    marks = {"watcher": watchdog.mark(owner.pid), "free": ""}
    children = {
        name: await asyncio.create_subprocess_exec(
            sys.executable, "-c", code, stdin=PIPE, stdout=PIPE, env={**os.environ, watchdog.MARK: mark}
        )
        for name, mark in marks.items()
    }
    for child in children.values():
        assert child.stdout is not None
        assert await child.stdout.readline() == b"up\n"
    owner.kill()
    await owner.wait()
    async with asyncio.timeout(60):
        assert await children["watcher"].wait() == -signal.SIGKILL
    assert children["free"].returncode is None
    await children["free"].communicate(b"\n")


def test_only_multiprocessing_blocks_are_swept() -> None:
    """`shared_memory_files` returns only names of shared memory that multiprocessing or vLLM has created. Names that
    are already unlinked are left out."""
    maps = """
7f1-7f2 rw-s 0 00:1a 5 /dev/shm/psm_abc123
7f2-7f3 rw-s 0 00:1a 5 /dev/shm/plasmaXYZ
7f3-7f4 rw-s 0 00:1a 5 /dev/shm/psm_gone (deleted)
7f4-7f5 r-xp 0 00:1a 5 /usr/lib/libc.so.6
7f5-7f6 rw-s 0 00:1a 5 /dev/shm/vllm_dist_1f-tp:0-[0-1]-cpushm_0
7f6-7f7 rw-s 0 00:1a 5 /dev/shm/33275-tp:0-[0-1]-cpushm_1
7f7-7f8 rw-s 0 00:1a 5 /dev/shm/33275-tp:0-[0-1]-cpushm_2 (deleted)
7f8-7f9 rw-s 0 00:1a 5 /dev/shm/34429-tp:0-[0-1]-cpushm-f6e59799-e621-4fe4-a9f8-1df8dcbb7a11-27_0
"""
    assert watchdog.shared_memory_files(maps) == {
        "psm_abc123",
        "vllm_dist_1f-tp:0-[0-1]-cpushm_0",
        "33275-tp:0-[0-1]-cpushm_1",
        "34429-tp:0-[0-1]-cpushm-f6e59799-e621-4fe4-a9f8-1df8dcbb7a11-27_0",
    }
