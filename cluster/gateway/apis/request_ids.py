"""Validation of the request ids that callers send, for all APIs. Request ids are passed on to logs, headers and
workers."""

from __future__ import annotations

import os
import re

from cluster.observe.trace_context import checked_tracestate, parse_traceparent

_REQUEST_ID = re.compile(r"[\x21-\x7e]{1,128}")
_LONGEST = 128
_LONGEST_TRACE = 512


def random_id() -> str:
    """Return 128 random bits in hexadecimal. Used as the request id if the caller has sent none."""
    return os.urandom(16).hex()


def request_id(value: object) -> str:
    """Return a valid request id unchanged, and "" for any other value. A valid id has 1 to 128 printable ASCII
    characters and no space."""
    return _matched(_REQUEST_ID, value)


def traceparent(value: object) -> str:
    """Return a valid W3C traceparent in the form of version 00, and "" for any other value."""
    if not isinstance(value, str) or not value or len(value) > _LONGEST_TRACE:
        return ""
    context = parse_traceparent(value)
    return "" if context is None else context.traceparent


def trace_state(value: object) -> str:
    """Return a valid W3C tracestate unchanged, and "" for any other value. The caller must ignore a tracestate that
    comes without a valid traceparent."""
    return checked_tracestate(value) if isinstance(value, str) else ""


def _matched(form: re.Pattern[str], value: object) -> str:
    if isinstance(value, str) and len(value) <= _LONGEST and form.fullmatch(value):
        return value
    return ""
