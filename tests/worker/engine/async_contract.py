"""What `make contract-v2` is about on either runner: the engine schedules asynchronously."""

from __future__ import annotations

from tests.worker.engine.conftest import schedules_asynchronously
from tests.worker.engine.contract import Subject


def test_it_schedules_asynchronously(fast_subject: Subject) -> None:
    """As vLLM does on GPUs by default; its CPU platform switches it off, and the tests' plugin on again."""
    assert schedules_asynchronously(fast_subject)
