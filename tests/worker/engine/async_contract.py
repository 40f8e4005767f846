"""Check that the engine schedules asynchronously in the environment of `make contract-v2`, on both model runners."""

from __future__ import annotations

from tests.worker.engine.conftest import schedules_asynchronously
from tests.worker.engine.contract import Subject


def test_it_schedules_asynchronously(fast_subject: Subject) -> None:
    """The engine schedules asynchronously, as vLLM does on GPUs. On CPUs the tests' plugin enables this."""
    assert schedules_asynchronously(fast_subject)
