"""After the death of the engine core or a rank, a waiting caller gets the reason at once, and no process is left."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path

import psutil
import pytest

from cluster.api.ports import EngineDead
from cluster.worker.engine.processes import end_causes, sockets
from cluster.worker.engine.vllm.cpu import lone_rank
from cluster.worker.engine.vllm.engine import VllmEngine
from tests.support.cpu import time_within
from tests.worker.engine.conftest import TOKEN_HI, TOKEN_LO, engine_children, tiny_spec
from tests.worker.engine.contract import Driver, Subject, request

pytestmark = pytest.mark.engine


async def _step_for_ever(engine: VllmEngine) -> None:
    while True:
        await engine.step()


async def _is_told(engine: VllmEngine, subject: Subject, how: str) -> None:
    """Check that the methods `step`, `check` and `submit` of a dead engine raise EngineDead. `how`: regular expression
    that the text of the error must match."""
    with time_within(10.0), pytest.raises(EngineDead, match=how):
        await asyncio.wait_for(_step_for_ever(engine), 60)
    with pytest.raises(EngineDead, match=how):
        await engine.check()
    with pytest.raises(EngineDead, match=how):
        await engine.submit(request(subject.prompt(2)))


async def test_death_is_told(llama_folder: Path) -> None:
    """Within seconds after the core is killed, `step`, `check` and `submit` raise EngineDead with the reason."""
    me = psutil.Process(os.getpid())
    before = set(engine_children(me))
    engine = VllmEngine(tiny_spec(), llama_folder)
    info = await engine.start()
    try:
        subject = Subject(engine, info, TOKEN_LO, TOKEN_HI)
        driver = Driver(subject)
        running = await driver.submit(request(subject.prompt(1), max_tokens=900))
        await driver.until(lambda: bool(driver.answers[running].outputs))
        (core,) = [child for child in engine_children(me) if child not in before]
        assert not engine_children(core), "the rank runs in the core"
        core.kill()
        await _is_told(engine, subject, r"^the engine core was killed by SIGKILL")
        gone, alive = await asyncio.to_thread(psutil.wait_procs, [core], 60)
        assert not alive, gone
    finally:
        await engine.close()


@pytest.mark.long
async def test_two_ranks_in_a_row(fast_subject: Subject, llama_folder: Path) -> None:
    """Two pipeline stages on CPUs give the same tokens as one stage.

    When the second rank crashes, the error names the rank and its signal, also through AsyncLLM, and all processes end.
    """
    me = psutil.Process(os.getpid())
    before = set(engine_children(me))
    spec = tiny_spec(pipeline_parallel_size=2)
    engine = VllmEngine(spec, llama_folder, executor="mp", prefer_fastpath=False)
    info = await engine.start()
    try:
        assert info.engine_class.endswith("-tp1-pp2")
        subject = Subject(engine, info, TOKEN_LO, TOKEN_HI)
        prompts = [fast_subject.prompt(400 + number, tokens=60) for number in range(3)]
        uncut = await Driver(fast_subject).run(*(request(prompt, max_tokens=12) for prompt in prompts))
        cut = await Driver(subject).run(*(request(prompt, max_tokens=12) for prompt in prompts))
        assert [answer.token_ids for answer in cut] == [answer.token_ids for answer in uncut]
        running = Driver(subject)
        key = await running.submit(request(subject.prompt(1), max_tokens=900))
        await running.until(lambda: bool(running.answers[key].outputs))
        (core,) = [child for child in engine_children(me) if child not in before]
        ranks = sorted(engine_children(core), key=lambda rank: rank.create_time())
        assert len(ranks) == 2
        ranks[1].send_signal(signal.SIGSEGV)
        await _is_told(engine, subject, r"^rank 1 (\(process \d+\) )?was killed by SIGSEGV")
        gone, alive = await asyncio.to_thread(psutil.wait_procs, [core, *ranks], 10)
        assert not alive, gone
    finally:
        await engine.close()


async def test_a_rank_that_is_killed_while_it_loads(llama_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If a rank is killed while it loads, the start ends at once with an error that names the rank and its signal."""
    monkeypatch.setenv(lone_rank.RANK, "process")
    me = psutil.Process(os.getpid())
    before = set(engine_children(me))

    def new_ranks() -> list[psutil.Process]:
        return [rank for core in engine_children(me) if core not in before for rank in engine_children(core)]

    engine = VllmEngine(tiny_spec(), llama_folder)
    start = asyncio.create_task(engine.start())
    try:
        while not (ranks := [rank for rank in new_ranks() if _has_said_who_it_is(rank.pid)]):
            assert not start.done()
            await asyncio.sleep(0.02)
        ranks[0].kill()
        with pytest.raises(
            EngineDead, match=r"the engine did not come up: rank 0 \(process \d+\) was killed by SIGKILL"
        ):
            await asyncio.wait_for(start, 60)
    finally:
        await engine.close()


def _has_said_who_it_is(pid: int) -> bool:
    folder = sockets.folder()
    return folder is not None and any(folder.glob(f"{end_causes.MEMBER}-*-{pid}"))
