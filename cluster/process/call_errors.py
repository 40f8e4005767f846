"""A function that checks whether an exception fails only one call. Code that serves many calls continues after such an
exception.
"""

from __future__ import annotations

PANIC = "PanicException"
"""Class name of a panic in a Rust extension. The class is a BaseException and cannot be imported."""


def is_call_failure(error: BaseException) -> bool:
    """Return whether an exception fails only the call that raised it. False for cancellations and process exits."""
    return isinstance(error, Exception) or type(error).__name__ == PANIC
