"""Validation of the request ids that callers send, for all APIs. Request ids are passed on to logs, headers and
workers."""

from __future__ import annotations

import os
import re

_REQUEST_ID = re.compile(r"[\x21-\x7e]{1,128}")
_TRACEPARENT = re.compile(r"[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}")
_LONGEST = 128


def random_id() -> str:
    """Return 128 random bits in hexadecimal, as the id of a request that came without an id."""
    return os.urandom(16).hex()


def request_id(value: object) -> str:
    """Return a valid request id unchanged, and "" for any other value. Valid is a text of 1 to 128 printable ASCII
    characters without a space."""
    return _matched(_REQUEST_ID, value)


def traceparent(value: object) -> str:
    """Return a valid W3C traceparent unchanged, and "" for any other value."""
    return _matched(_TRACEPARENT, value)


def _matched(form: re.Pattern[str], value: object) -> str:
    if isinstance(value, str) and len(value) <= _LONGEST and form.fullmatch(value):
        return value
    return ""
