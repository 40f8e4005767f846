"""The newest scaling decisions on one model, kept for explanations, and the number of all decisions on the model."""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Mapping, Sequence

from cluster.api.scaling import ScalingDecision

KEPT = 200
"""Number of decisions that are kept for each model, for explanations."""


class DecisionLog:
    """The newest scaling decisions on one model. Successive decisions with the action `hold` and the same reason are
    one entry."""

    def __init__(self) -> None:
        self._decisions: deque[ScalingDecision] = deque(maxlen=KEPT)
        self._counts: dict[str, int] = {}

    def __repr__(self) -> str:
        return f"DecisionLog({self._counts})"

    def add(self, decision: ScalingDecision) -> None:
        """Count a decision of the policy and keep it."""
        self._counts[decision.action] = self._counts.get(decision.action, 0) + 1
        last = self._decisions[-1] if self._decisions else None
        if decision.action == "hold" and last is not None and (last.action, last.why) == ("hold", decision.why):
            self._decisions[-1] = dataclasses.replace(last, numbers=decision.numbers, passes=last.passes + 1)
        else:
            self._decisions.append(decision)

    def add_uncounted(self, decision: ScalingDecision) -> None:
        """Keep a decision that the scaling policy did not make. `counts` does not include it."""
        self._decisions.append(decision)

    def newest(self, limit: int = 0) -> Sequence[ScalingDecision]:
        """Return up to `limit` decisions, or all kept decisions if `limit` is 0. The newest is last."""
        return list(self._decisions)[-limit if limit else 0 :]

    @property
    def why(self) -> str:
        """Reason of the newest decision; empty if there is no decision."""
        return self._decisions[-1].why if self._decisions else ""

    @property
    def counts(self) -> Mapping[str, int]:
        """Number of the policy's decisions of each action, since the log was created."""
        return dict(self._counts)


def action_of(before: int, after: int) -> str:
    """Return the name of the action that changes the number of replicas from `before` to `after`: `up`, `down`, `hold`,
    `from_zero` or `to_zero`."""
    if after == before:
        return "hold"
    if after > before:
        return "up" if before else "from_zero"
    return "down" if after else "to_zero"
