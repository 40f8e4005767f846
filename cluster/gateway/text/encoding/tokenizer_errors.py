"""Conversion of errors of the Rust tokenizer into CallErrors, for errors that a caller's text has caused."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import structlog

from cluster.api.outcomes import CallError, invalid

log = structlog.get_logger("text")


@contextmanager
def field_in_errors(field: str) -> Iterator[None]:
    """Context manager that converts errors of the tokenizer (see `caller_error`). The errors name `field`."""
    try:
        yield
    except BaseException as error:
        raise caller_error(error, field) from None


def caller_error(error: BaseException, field: str) -> BaseException:
    """Return the CallError for an error that a text has caused in the Rust tokenizer: a TypeError for a lone surrogate,
    or a panic (a BaseException). Any other error is returned unchanged."""
    if isinstance(error, TypeError):
        return _no_unicode(field)
    if type(error).__name__ != "PanicException":
        return error
    log.warning("tokenizer.panicked", reason=str(error)[:200])
    return invalid(field, "the model's tokenizer cannot process this text: send a shorter or simpler one")


def _no_unicode(field: str) -> CallError:
    return invalid(field, "the text is not valid Unicode (a lone surrogate): send well-formed text")
