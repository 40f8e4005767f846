"""What `make contract-v2` is about on either runner: the engine schedules asynchronously."""

from __future__ import annotations

from typing import Any

from tests.engine.contract import Subject


def test_it_schedules_asynchronously(fast_subject: Subject) -> None:
    """As vLLM does on GPUs by default; its CPU platform switches it off, and the tests' plugin on again."""
    engine: Any = fast_subject.engine
    assert engine._path._core.vllm_config.scheduler_config.async_scheduling
