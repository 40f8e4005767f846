"""The demand of all gateways as one. Pure.

Problem: gateways come, go and start anew, and so does the controller; whatever has come must count once. Each gateway
therefore tells counters since its start, by the name of that start (its incarnation), and how long it has counted.
Invariants: between two `take`s a gateway's arrivals are the growth of its counters; a gateway that began to count after
this began counts from zero, any other that is new here from what it says first; counters never count backwards; a
gateway that is away counts with what it told last until then, and what waits there counts no more.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from cluster.api.demand import ClassCounts, ModelDemand
from cluster.policy.scaling.portfolio import ClassDemand

FORGET_S = 600.0
"""A gateway that has been away for so long does not come back under that name."""

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
    heard_at: float
    here: bool = True
    told: dict[_Key, ClassCounts] = field(default_factory=dict)
    taken: dict[_Key, ClassCounts] = field(default_factory=dict)


class Demands:
    """What is told by `told` and `left` is asked for by `take`, once a pass."""

    def __init__(self, now: float) -> None:
        self._began_at = now
        self._gateways: dict[str, _Gateway] = {}
        self.ranks: dict[str, int] = {}
        """Of the classes, as the gateways have told them."""

    def told(self, gateway: str, demand: Sequence[ModelDemand], counting_s: float, now: float) -> bool:
        """A report of a gateway's incarnation that has counted for `counting_s`. True when calls are held there for a
        model for which none were: somebody should look now."""
        told = {(d.model, c.priority_class): c for d in demand for c in d.classes}
        known = self._gateways.get(gateway)
        if known is None:
            known = self._gateways[gateway] = _Gateway(now)
            if now - counting_s < max(self._began_at, now - FORGET_S):
                known.taken = dict(told)  # what came before was not ours to see, or has been seen and forgotten
        before = known.told if known.here else {}
        known.heard_at, known.here, known.told = now, True, {**known.told, **told}
        for key in known.told.keys() - told.keys():  # forgotten there: nothing of it waits
            known.told[key] = _at_rest(known.told[key])
        self.ranks.update({c.priority_class: c.rank for c in told.values()})
        return any(c.held_requests and not (key in before and before[key].held_requests) for key, c in told.items())

    def left(self, gateway: str) -> None:
        """Its link has ended: what waits there is seen no more."""
        known = self._gateways.get(gateway)
        if known is not None:
            known.here = False
            known.told = {key: _at_rest(c) for key, c in known.told.items()}

    def take(self, now: float) -> Mapping[str, Mapping[str, ClassDemand]]:
        """By model and class: what has come since the last take, and what waits now."""
        sums: dict[str, dict[str, ClassDemand]] = {}
        for name, gateway in list(self._gateways.items()):
            for key, counts in gateway.told.items():
                grown = _grown(gateway.taken.get(key), counts)
                model = sums.setdefault(key[0], {})
                model[key[1]] = _plus(model.get(key[1], ClassDemand()), grown, counts)
            gateway.taken = dict(gateway.told)
            if not gateway.here and now - gateway.heard_at >= FORGET_S:
                del self._gateways[name]
        return sums

    def __repr__(self) -> str:
        return f"Demands({sum(g.here for g in self._gateways.values())} gateways)"


def _at_rest(c: ClassCounts) -> ClassCounts:
    """The counters alone."""
    return ClassCounts(c.priority_class, c.rank, **{name: getattr(c, name) for name in _COUNTED})


def _grown(before: ClassCounts | None, now: ClassCounts) -> Mapping[str, int]:
    return {name: max(getattr(now, name) - (getattr(before, name) if before else 0), 0) for name in _COUNTED}


def _plus(sum_: ClassDemand, grown: Mapping[str, int], now: ClassCounts) -> ClassDemand:
    deadlines = [d for d in (sum_.nearest_deadline_s, now.nearest_deadline_s) if d is not None]
    return ClassDemand(
        **{name: getattr(sum_, name) + grown[name] for name in _COUNTED},
        queued_requests=sum_.queued_requests + now.queued_requests,
        queued_tokens=sum_.queued_tokens + now.queued_tokens,
        oldest_wait_s=max(sum_.oldest_wait_s, now.oldest_wait_s),
        nearest_deadline_s=min(deadlines) if deadlines else None,
        held_requests=sum_.held_requests + now.held_requests,
    )
