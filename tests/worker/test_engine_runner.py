"""Aborts of requests in a worker's engine."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest

from cluster.api.ports import EngineDead
from cluster.worker.engine.simulated.engine import SimConfig, SimEngine
from cluster.worker.engine_runner import EngineRunner


class _Failing(SimEngine):
    """An engine whose aborts fail: with EngineDead for the id `fatal`, and with ValueError for other ids."""

    async def abort(self, request_ids: Sequence[str]) -> None:
        """Raise an error."""
        raise EngineDead("it is gone") if "fatal" in request_ids else ValueError(request_ids)


@pytest.mark.slow
async def test_a_failed_abort_ends_nothing_but_a_dead_engine_is_reported() -> None:
    """An abort that fails does not end the engine's runner. If an abort finds the engine dead, `wait_dead` raises the
    error."""
    runner = EngineRunner(_Failing(SimConfig(vocab=9)))
    death = asyncio.ensure_future(runner.wait_dead())
    await runner.abort(["other"])
    assert not death.done()
    runner.abort_in_background(["fatal"])
    await runner.finish()
    with pytest.raises(EngineDead, match="it is gone"):
        await death
