"""Samples for a gateway's history: rates and counts, computed from two snapshots (survey.py)."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Final

from cluster.gateway.apis.slices import in_slices
from cluster.gateway.console.overview.parts import STEP_S, rate_of
from cluster.gateway.console.overview.survey import Snapshot, Tally

if TYPE_CHECKING:
    from cluster.gateway.console.history.history import History

MAX_STEPS: Final = 720
"""Maximum number of steps in a query: one hour."""


class HistorySampler:
    """Adds samples to the history of one gateway process. Keeps the snapshot of the last sample, with which the next
    snapshot is compared."""

    def __init__(self) -> None:
        self._history: History | None = None
        self._before: Snapshot | None = None
        self._step = -1

    @property
    def history(self) -> History | None:
        """The history; None before the first sample."""
        return self._history

    async def sample(self, shot: Snapshot) -> None:
        """Add a sample that covers the time since the last sample. A second sample in the same step of the history is
        ignored, and so are samples before numpy is imported (deferred_imports.py)."""
        step = int(shot.epoch_s // STEP_S)
        if step == self._step:
            return
        before, self._before, self._step = self._before, shot, step
        if before is None or shot.now <= before.now or "numpy" not in sys.modules:
            return
        if self._history is None:
            from cluster.gateway.console.history.history import History

            self._history = History()
        await in_slices(_put_models(self._history, step, shot, before))
        await in_slices(_put_tenants(self._history, step, shot, before))
        self._history.forget_older(shot.epoch_s)


def _put_models(history: History, step: int, shot: Snapshot, before: Snapshot) -> Iterator[None]:
    from cluster.gateway.console.history.history import BUCKETS

    interval_s = shot.now - before.now
    for name, tally in shot.models.items():
        past = before.models.get(name) or Tally()
        old = past.ttft or (0,) * BUCKETS
        counts = [max(new - was, 0) for new, was in zip(tally.ttft, old, strict=True)] if tally.ttft else [0] * BUCKETS
        values = (
            rate_of(tally.tokens, past.tokens, interval_s),
            tally.running,
            tally.waiting,
            _cost_per_h(tally, past, interval_s),
            tally.prompt_tokens - past.prompt_tokens,
            tally.cached_tokens - past.cached_tokens,
            tally.gap,
            tally.replicas_wanted,
            tally.replicas_had,
            *counts,
        )
        history.models.put(name, step, values)
        yield None


def _put_tenants(history: History, step: int, shot: Snapshot, before: Snapshot) -> Iterator[None]:
    """Add the values of the tenants with calls. A tenant without calls gets no value, so it takes no memory."""
    interval_s = shot.now - before.now
    for name, tally in shot.tenants.items():
        past = before.tenants.get(name) or Tally()
        if not (tally.running or tally.waiting or tally.requests or past.running):
            continue
        history.tenants.put(
            name,
            step,
            (
                rate_of(tally.tokens, past.tokens, interval_s),
                max(tally.requests - past.requests, 0) / interval_s,
                tally.running,
                tally.waiting,
                _cost_per_h(tally, past, interval_s),
                max(tally.prompt_tokens - past.prompt_tokens, 0),
                max(tally.cached_tokens - past.cached_tokens, 0),
            ),
        )
        yield None


def _cost_per_h(tally: Tally, past: Tally, interval_s: float) -> float:
    return max(tally.cost - past.cost, 0.0) / interval_s * 3600


async def query_columns(history: History | None, query: Mapping[str, Any]) -> dict[str, list[float]]:
    """Return this process's columns of the history for a query. Returns no columns before the first sample. Raises
    ValueError for a query of more than an hour."""
    if history is None:
        return {}
    first, last = int(query["first"]), int(query["last"])
    if not 0 <= last - first < MAX_STEPS:
        raise ValueError(f"a query has 1 to {MAX_STEPS} steps")
    return await history.columns(query["columns"], query["model"], query["tenant"], first, last)
