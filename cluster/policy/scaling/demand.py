"""Sum of the demand that all gateways report. Pure.

Problem: gateways and the controller start and stop, and each arrival must count once. So each gateway reports its
incarnation, its counters since its start, and the seconds since its start.

Invariants: between two calls of `pop_demand`, the arrivals of a gateway are the growth of its counters, never negative.
For a gateway that started after this object was created, the growth begins at zero. For any other gateway, the growth
begins at its first report to this object. After a disconnect, arrivals up to the last report still count; waiting calls
do not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from cluster.api.demand import ClassCounts, ModelDemand
from cluster.policy.scaling.portfolio import ClassDemand

FORGET_S = 600.0
"""Time in seconds after which an absent gateway incarnation is forgotten, because it does not come back."""

_Key = tuple[str, str]
_COUNTED = (
    "arrived_requests",
    "arrived_prompt_tokens",
    "expected_output_tokens",
    "within_slo",
    "outside_slo",
)


@dataclass(slots=True)
class _Gateway:
    reported_at: float
    connected: bool = True
    reported: dict[_Key, ClassCounts] = field(default_factory=dict)
    counted: dict[_Key, ClassCounts] = field(default_factory=dict)


class DemandTotals:
    """Sum of the demand of all gateways.

    `record_report` and `record_disconnect` update the demand of one gateway. `pop_demand` reads the sum, once for each
    scaling decision.
    """

    def __init__(self, now: float) -> None:
        self._began_at = now
        self._gateways: dict[str, _Gateway] = {}
        self.ranks: dict[str, int] = {}
        """Rank of each priority class, as reported by the gateways."""

    def record_report(self, gateway: str, demand: Sequence[ModelDemand], counting_s: float, now: float) -> bool:
        """Record a report of a gateway incarnation that has counted for `counting_s` seconds.

        Returns True if scaling should be decided at once: calls of some model and class wait because no replica is
        ready, and no such calls waited in the gateway's previous report.
        """
        report = {(d.model, c.priority_class): c for d in demand for c in d.classes}
        known = self._gateways.get(gateway)
        if known is None:
            known = self._gateways[gateway] = _Gateway(now)
            if now - counting_s < max(self._began_at, now - FORGET_S):
                known.counted = dict(report)  # the gateway is older than this object, or was forgotten
        before = known.reported if known.connected else {}
        known.reported_at, known.connected, known.reported = now, True, {**known.reported, **report}
        for key in known.reported.keys() - report.keys():  # a key that the gateway no longer lists: nothing waits
            known.reported[key] = _counters_only(known.reported[key])
        self.ranks.update({c.priority_class: c.rank for c in report.values()})
        return any(c.held_requests and not (key in before and before[key].held_requests) for key, c in report.items())

    def record_disconnect(self, gateway: str) -> None:
        """Record that the link to a gateway has ended. Calls that wait on this gateway no longer count."""
        known = self._gateways.get(gateway)
        if known is not None:
            known.connected = False
            known.reported = {key: _counters_only(c) for key, c in known.reported.items()}

    def pop_demand(self, now: float) -> Mapping[str, Mapping[str, ClassDemand]]:
        """Return the demand by model and class: the arrivals since the last call of this method, and the calls that
        wait now."""
        sums: dict[str, dict[str, ClassDemand]] = {}
        for name, gateway in list(self._gateways.items()):
            for key, counts in gateway.reported.items():
                grown = _growth(gateway.counted.get(key), counts)
                model = sums.setdefault(key[0], {})
                model[key[1]] = _add_demand(model.get(key[1], ClassDemand()), grown, counts)
            gateway.counted = dict(gateway.reported)
            if not gateway.connected and now - gateway.reported_at >= FORGET_S:
                del self._gateways[name]
        return sums

    def __repr__(self) -> str:
        return f"DemandTotals({sum(g.connected for g in self._gateways.values())} gateways)"


def _counters_only(c: ClassCounts) -> ClassCounts:
    """Return a copy with only the counters. The fields for waiting calls are empty."""
    return ClassCounts(c.priority_class, c.rank, **{name: getattr(c, name) for name in _COUNTED})


def _growth(before: ClassCounts | None, now: ClassCounts) -> Mapping[str, int]:
    return {name: max(getattr(now, name) - (getattr(before, name) if before else 0), 0) for name in _COUNTED}


def _add_demand(sum_: ClassDemand, grown: Mapping[str, int], now: ClassCounts) -> ClassDemand:
    deadlines = [d for d in (sum_.nearest_deadline_s, now.nearest_deadline_s) if d is not None]
    return ClassDemand(
        **{name: getattr(sum_, name) + grown[name] for name in _COUNTED},
        queued_requests=sum_.queued_requests + now.queued_requests,
        queued_tokens=sum_.queued_tokens + now.queued_tokens,
        oldest_wait_s=max(sum_.oldest_wait_s, now.oldest_wait_s),
        nearest_deadline_s=min(deadlines) if deadlines else None,
        held_requests=sum_.held_requests + now.held_requests,
    )
