"""W3C trace context: the trace to which a call belongs, and whether the call is sampled. The functions do no I/O.

Source: https://www.w3.org/TR/trace-context/ (traceparent version 00). From later versions, only the fields of version
00 are read.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

SAMPLED: Final = 0x01
MAX_STATE: Final = 512
"""Greatest length of a tracestate that is passed on, in characters. A longer one is dropped, as the standard allows."""

_TRACEPARENT = re.compile(
    r"(?!ff)([0-9a-f]{2})-(?!0{32})([0-9a-f]{32})-(?!0{16})([0-9a-f]{16})-([0-9a-f]{2})(-[\x21-\x7e]{0,128})?"
)
_MEMBER = re.compile(r"[a-z0-9][a-z0-9_\-*/@]{0,255}=[\x20-\x2b\x2d-\x3c\x3e-\x7e]{0,256}")
_RATIO_BITS: Final = 56
"""Number of random bits of a trace id that decide whether to sample the trace (W3C Trace Context Level 2)."""


@dataclass(frozen=True, slots=True)
class TraceContext:
    """A span that becomes the parent of new spans; it belongs to a caller or to this process. Ids are lower-case
    hexadecimal."""

    trace_id: str
    span_id: str
    is_sampled: bool

    @property
    def traceparent(self) -> str:
        """The context as the value of a traceparent header."""
        return f"00-{self.trace_id}-{self.span_id}-{SAMPLED if self.is_sampled else 0:02x}"


def parse_traceparent(text: str) -> TraceContext | None:
    """Return the context in a traceparent header; None if the header is invalid. Fields that a later version of the
    standard has added are ignored."""
    match = _TRACEPARENT.fullmatch(text)
    if match is None:
        return None
    version, trace_id, span_id, flags, more = match.groups()
    if version == "00" and more is not None:
        return None
    return TraceContext(trace_id, span_id, bool(int(flags, 16) & SAMPLED))


def unsampled(traceparent: str) -> str:
    """Return `traceparent` with the flag `sampled` removed. `traceparent` must be of version 00 or empty."""
    return f"{traceparent[:53]}00" if traceparent else ""


def checked_tracestate(text: str) -> str:
    """Return `text` unchanged if it is a valid tracestate header, otherwise ""."""
    if not text or len(text) > MAX_STATE:
        return ""
    members = [stripped for member in text.split(",") if (stripped := member.strip(" \t"))]
    return text if members and all(map(_MEMBER.fullmatch, members)) else ""


def is_sampled(traceparent: str) -> bool:
    """Return whether a traceparent belongs to a sampled call; False for an invalid traceparent."""
    context = parse_traceparent(traceparent) if traceparent else None
    return context is not None and context.is_sampled


def is_in_ratio(trace_id: str, ratio: float) -> bool:
    """Return whether a trace is sampled if the share `ratio` of all traces is sampled. The result depends only on the
    trace id, so all gateways sample the same traces."""
    return int(trace_id[-(_RATIO_BITS // 4) :], 16) < ratio * (1 << _RATIO_BITS)
