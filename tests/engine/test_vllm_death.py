"""When the engine core or one rank dies, whoever waits for a step learns it at once, and nothing is left."""

from __future__ import annotations

import asyncio
import os
import time
from pathlib import Path

import psutil
import pytest

from cluster.api.ports import EngineDead
from cluster.engine import lone_rank
from cluster.engine.vllm_engine import VllmEngine
from tests.engine.conftest import TOKEN_HI, TOKEN_LO, engine_children, tiny_spec
from tests.engine.contract import Driver, Subject, request

pytestmark = pytest.mark.engine


async def _step_for_ever(engine: VllmEngine) -> None:
    while True:
        await engine.step()


@pytest.mark.parametrize(("victim", "prefer_fastpath"), [("core", True), ("rank", False)])
async def test_death_is_told(
    llama_folder: Path, victim: str, prefer_fastpath: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A killed core or rank raises EngineDead from step, check and submit within seconds, and takes the rest along."""
    monkeypatch.setenv(lone_rank.RANK, "process" if victim == "rank" else "core")
    me = psutil.Process(os.getpid())
    before = set(me.children())
    engine = VllmEngine(tiny_spec(), llama_folder, prefer_fastpath=prefer_fastpath)
    info = await engine.start()
    try:
        subject = Subject(engine, info, TOKEN_LO, TOKEN_HI)
        driver = Driver(subject)
        running = await driver.submit(request(subject.prompt(1), max_tokens=900))
        await driver.until(lambda: bool(driver.answers[running].outputs))
        (child,) = [child for child in engine_children(me) if child not in before]
        ranks = engine_children(child)
        assert len(ranks) == (victim == "rank")
        family = [child, *ranks]
        (ranks[0] if victim == "rank" else child).kill()
        begin = time.monotonic()
        with pytest.raises(EngineDead):
            await asyncio.wait_for(_step_for_ever(engine), 15)
        assert time.monotonic() - begin < 10
        with pytest.raises(EngineDead):
            await engine.check()
        with pytest.raises(EngineDead):
            await engine.submit(request(subject.prompt(2)))
        gone, alive = await asyncio.to_thread(psutil.wait_procs, family, 10)
        assert not alive, gone
    finally:
        await engine.close()
