"""Which exceptions are the failure of one call, so that code shared by many calls ends that call and goes on."""

from __future__ import annotations

PANIC = "PanicException"
"""What a Rust extension raises when it panics; it is a BaseException and has no importable class."""


def is_call_failure(error: BaseException) -> bool:
    """Whether an exception raised for one call ends only that call. Cancellation and exits of the process do not."""
    return isinstance(error, Exception) or type(error).__name__ == PANIC
