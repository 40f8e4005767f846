"""Check of the environment of `make contract-v2`: the engine schedules asynchronously on either runner."""

from __future__ import annotations

from tests.worker.engine.conftest import schedules_asynchronously
from tests.worker.engine.contract import Subject


def test_it_schedules_asynchronously(fast_subject: Subject) -> None:
    """The engine schedules asynchronously, as vLLM does on GPUs. The tests' plugin enables this on the CPU platform."""
    assert schedules_asynchronously(fast_subject)
