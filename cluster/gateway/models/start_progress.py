"""The progress of a model's start, estimated from earlier starts."""

from __future__ import annotations

from typing import Final

from cluster.api.types import CatalogEntry, ModelState

MAX_PROGRESS: Final = 0.99
"""Upper bound of the reported progress of a model's start, used when the start takes longer than expected."""


def expected_progress(entry: CatalogEntry, wall_s: float) -> tuple[float, float]:
    """Return the progress of a model's start in [0, 1] and the remaining seconds; (0, 0) if unknown.

    The result is meaningful only while no worker serves the model. `wall_s`: the current time in seconds since the Unix
    epoch."""
    whole_s, since_s = entry.cold_start_s, entry.starting_since_s
    if whole_s <= 0 or entry.state in (ModelState.FAILED, ModelState.GONE):
        return 0.0, 0.0
    passed_s = max(wall_s - since_s, 0.0) if since_s else 0.0
    return min(passed_s / whole_s, MAX_PROGRESS), max(whole_s - passed_s, (1 - MAX_PROGRESS) * whole_s)
