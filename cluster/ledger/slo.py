"""Attainment of service level objectives by tenant and model. This module imports no SQLAlchemy.

The attainment is computed from usage records, so it covers only calls that a worker has accepted. A call that was
refused earlier, for example because the queue was full, has no record. The metric `headrace_slo_calls_total` also
counts such calls.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

COUNTED = ("met", "late_first_token", "slow_tokens", "failed")
"""Results of judged calls, as in the metric `headrace_slo_calls_total`."""
NOT_COUNTED = ("not_judged", "unknown")
SOURCE = "usage records: calls that a worker accepted, by the UTC day on which they began"
MISSING = (
    "calls refused before a worker accepted them have no usage record (headrace_slo_calls_total counts them, by model)",
    "calls are judged by the SLO that their model has now, not by an earlier one",
    "the time between tokens is the rest of a call's duration by its delivered tokens; with n > 1, of the first output",
    "records that the retention of usage has removed, and records that wait in a gateway's spool",
)
"""Sentences for the reader of a report, which name what the sums do not contain."""


@dataclass(frozen=True, slots=True)
class SloObjective:
    """The SLO of a model: two time limits in seconds (0: no limit), and the share of calls that should meet both."""

    ttft_s: float
    itl_s: float
    target: float


@dataclass(frozen=True, slots=True)
class SloSum:
    """The numbers of calls of a tenant to a model that met or missed the model's SLO.

    `objective` is None for a model that is not in the catalog. `not_judged` counts the calls of such a model, invalid
    calls, and calls that their callers cancelled before the first token was late. `unknown` counts calls of lost
    gateways, whose times are not recorded.
    """

    tenant: str
    model: str
    objective: SloObjective | None
    met: int = 0
    late_first_token: int = 0
    slow_tokens: int = 0
    failed: int = 0
    not_judged: int = 0
    unknown: int = 0

    @property
    def calls(self) -> int:
        """Number of calls that were judged."""
        return self.met + self.late_first_token + self.slow_tokens + self.failed

    @property
    def attainment(self) -> float | None:
        """Share of the judged calls that met the SLO; None without a judged call."""
        return self.met / self.calls if self.calls else None

    @property
    def budget_left(self) -> float | None:
        """Part of the error budget that is left: 1 if no call missed the SLO, 0 if as many calls missed it as the
        target allows, negative if more calls missed it. None without a judged call, or if the SLO has no target."""
        if self.objective is None or not self.calls or not 0 < self.objective.target < 1:
            return None
        return 1 - (self.calls - self.met) / (self.calls * (1 - self.objective.target))

    def as_json(self) -> dict[str, Any]:
        """Return the counts, the objective, the attainment and the error budget as plain JSON values."""
        objective = self.objective
        return {
            "tenant": self.tenant,
            "model": self.model,
            "calls": self.calls,
            "good": self.met,
            "attainment": self.attainment,
            "target": objective.target or None if objective else None,
            "ttft_s": objective.ttft_s if objective else None,
            "itl_s": objective.itl_s if objective else None,
            "budget_left": self.budget_left,
            **{name: getattr(self, name) for name in (*COUNTED[1:], *NOT_COUNTED)},
        }


SloObjectives = Mapping[str, SloObjective]
