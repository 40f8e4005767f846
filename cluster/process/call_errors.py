"""The exceptions that are the failure of one call, for code that is shared by many calls and must continue."""

from __future__ import annotations

PANIC = "PanicException"
"""Class name of a Rust extension's panic: a BaseException without an importable class."""


def is_call_failure(error: BaseException) -> bool:
    """Whether an exception raised for one call ends only that call. Cancellation and process exits do not."""
    return isinstance(error, Exception) or type(error).__name__ == PANIC
