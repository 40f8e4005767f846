"""Results of a run: one record per call, and the figures computed from the records.

TPOT is (last piece - first piece) / (tokens - 1) with the server's own token count, so coalescing several tokens into a
piece cannot improve TPOT. ITL is the gap between two pieces of text. Coalescing makes ITL longer, never shorter. Two
more figures are reported together with ITL: the share of pieces with one token, and the longest gap.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

QUANTILES = (50, 90, 99)


@dataclass(slots=True)
class Record:
    """Record of one call. Times are seconds from the beginning of the run; the time of an event is None if the call
    ended before this event."""

    key: str
    group: str
    due_s: float
    asked_tokens: int
    sent_s: float = 0.0
    first_s: float | None = None
    last_s: float | None = None
    ended_s: float = 0.0
    pieces: int = 0
    gaps_s: list[float] = field(default_factory=list)
    tokens: int = 0
    prompt_tokens: int | None = None
    cached_tokens: int | None = None
    finish_reason: str = ""
    text_digest: str = ""
    error: str = ""
    message: str = ""

    @property
    def ok(self) -> bool:
        """Whether the complete answer arrived."""
        return not self.error

    @property
    def ttft_s(self) -> float | None:
        """Time from sending the call to the first piece of text, in seconds."""
        return None if self.first_s is None else self.first_s - self.sent_s

    @property
    def tpot_s(self) -> float | None:
        """Seconds per token after the first token; None below two tokens."""
        if self.first_s is None or self.last_s is None or self.tokens < 2:
            return None
        return (self.last_s - self.first_s) / (self.tokens - 1)

    @property
    def e2e_s(self) -> float:
        """Time from sending the call to the end of the call, in seconds."""
        return self.ended_s - self.sent_s

    @property
    def longest_gap_s(self) -> float:
        """The longest silence after the first piece, in seconds."""
        return max(self.gaps_s, default=0.0)

    def sample(self) -> dict[str, Any]:
        """Return the call as a raw sample of the report."""
        return {
            "due_s": _short(self.due_s),
            "sent_s": _short(self.sent_s),
            "ttft_s": _short(self.ttft_s),
            "tpot_s": _short(self.tpot_s),
            "e2e_s": _short(self.e2e_s),
            "longest_gap_s": _short(self.longest_gap_s),
            "tokens": self.tokens,
            "pieces": self.pieces,
            "prompt_tokens": self.prompt_tokens,
            "error": self.error,
        }


def digest(pieces: Sequence[str]) -> str:
    """Return a short digest of a text."""
    return hashlib.blake2b("".join(pieces).encode(), digest_size=8).hexdigest()


@dataclass(frozen=True, slots=True)
class Slo:
    """Bounds in seconds. Goodput counts the calls that meet every given bound."""

    ttft_s: float | None = None
    tpot_s: float | None = None
    e2e_s: float | None = None

    def met_by(self, record: Record) -> bool:
        """Return whether a call meets the SLO."""
        pairs = ((self.ttft_s, record.ttft_s), (self.tpot_s, record.tpot_s), (self.e2e_s, record.e2e_s))
        return record.ok and all(bound is None or (value or 0.0) <= bound for bound, value in pairs)


@dataclass(frozen=True, slots=True)
class Run:
    """Calls of one run in the order in which they were due, and the duration of the run."""

    records: Sequence[Record]
    duration_s: float
    driver_cpu_s: float
    problem: str = ""
    """Reason of an early end; empty if every call was made."""

    @property
    def good(self) -> Sequence[Record]:
        """Records of the calls with a complete answer."""
        return [record for record in self.records if record.ok]

    @property
    def tokens(self) -> int:
        """Number of tokens of all complete answers."""
        return sum(record.tokens for record in self.good)

    @property
    def one_token_share(self) -> float | None:
        """Lower bound on the share of pieces with one token. The bound is exact if all other pieces held two tokens."""
        pieces = sum(record.pieces for record in self.good)
        return None if not pieces else max(0.0, 1.0 - (self.tokens - pieces) / pieces)

    def errors(self) -> dict[str, int]:
        """Return the number of failed calls by kind of error."""
        return dict(Counter(record.error for record in self.records if record.error))

    def quantile(self, name: str, percent: float) -> float | None:
        """Return a quantile of `ttft_s`, `tpot_s`, `e2e_s`, `itl_s` or `lateness_s` over the complete answers, in
        seconds.
        """
        values = self._values(name)
        return float(np.percentile(values, percent)) if values else None

    def _values(self, name: str) -> list[float]:
        if name == "itl_s":
            return [gap for record in self.good for gap in record.gaps_s]
        if name == "lateness_s":
            return [max(record.sent_s - record.due_s, 0.0) for record in self.records]
        return [value for record in self.good if (value := getattr(record, name)) is not None]

    def summary(self, slo: Slo | None = None) -> dict[str, Any]:
        """Return counts, rates and quantiles. The names include the units."""
        out: dict[str, Any] = {
            "calls": len(self.records),
            "whole_answers": len(self.good),
            "errors": self.errors(),
            "duration_s": round(self.duration_s, 4),
            "tokens": self.tokens,
            "requests_per_s": round(len(self.good) / self.duration_s, 3) if self.duration_s else None,
            "tokens_per_s": round(self.tokens / self.duration_s, 2) if self.duration_s else None,
            "short_answers": sum(1 for r in self.good if r.tokens != r.asked_tokens),
            "longest_silent_gap_s": _short(max((r.longest_gap_s for r in self.good), default=0.0)),
            "pieces_with_one_token_at_least": _short(self.one_token_share),
            "driver_cpu_us_per_token": round(self.driver_cpu_s / self.tokens * 1e6, 2) if self.tokens else None,
        }
        for name in ("ttft_s", "tpot_s", "itl_s", "e2e_s", "lateness_s"):
            out[name] = {f"p{q}": _short(self.quantile(name, q)) for q in QUANTILES}
        if slo is not None:
            met = sum(1 for record in self.records if slo.met_by(record))
            out["goodput_per_s"] = round(met / self.duration_s, 3) if self.duration_s else None
        return out


def same_texts(one: Run, other: Run) -> tuple[int, int]:
    """Compare the texts of two runs of the same requests; return (number of equal texts, number of compared texts)."""
    texts = {record.key: record.text_digest for record in one.good}
    pairs: Mapping[str, tuple[str, str]] = {r.key: (texts[r.key], r.text_digest) for r in other.good if r.key in texts}
    return sum(1 for a, b in pairs.values() if a == b), len(pairs)


def _short(value: float | None) -> float | None:
    return None if value is None else round(value, 6)
