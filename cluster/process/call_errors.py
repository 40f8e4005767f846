"""A check for exceptions that end only one call. Code that many calls share uses the check, and continues after such an
exception."""

from __future__ import annotations

PANIC = "PanicException"
"""Class name of a Rust extension's panic, which is a BaseException without an importable class."""


def is_call_failure(error: BaseException) -> bool:
    """Whether an exception raised for one call ends only that call. Cancellation and process exits do not count."""
    return isinstance(error, Exception) or type(error).__name__ == PANIC
