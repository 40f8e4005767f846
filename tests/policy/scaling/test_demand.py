"""Tests of the demand, summed over gateways that start and stop: each arrival counts once."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from cluster.api.demand import ClassCounts, ModelDemand
from cluster.policy.scaling.demand import FORGET_S, DemandTotals


def counts(arrived: int, **more: object) -> ClassCounts:
    """Return the counters of the class `c` after `arrived` calls. Each call has ten prompt tokens."""
    return ClassCounts("c", 1, arrived, 10 * arrived, 20 * arrived, **more)  # type: ignore[arg-type]


def report(*classes: ClassCounts, model: str = "m") -> list[ModelDemand]:
    """Return the report of a gateway."""
    return [ModelDemand(model, 0, 0, 0, 0, 0, classes)]


class Gateway:
    """A gateway process that counts calls and may restart."""

    def __init__(self) -> None:
        self.starts = 0
        self.restart(0.0)

    def restart(self, now: float) -> None:
        """Restart with zero counters, as another incarnation."""
        self.starts, self.arrived, self.since = self.starts + 1, 0, now


STEPS = st.lists(
    st.tuples(st.sampled_from(["come", "tell", "take", "restart", "leave", "return"]), st.integers(0, 2)), max_size=60
)


@given(STEPS)
def test_every_arrival_counts_once(steps: list[tuple[str, int]]) -> None:
    """Despite repeated and lost reports, restarts and disconnects, the sum that the scaler reads equals the sum of the
    reported arrivals."""
    gateways = [Gateway() for _ in range(3)]
    demands, now = DemandTotals(0.0), 0.0
    told: Counter[tuple[int, int]] = Counter()
    taken = 0
    for what, which in steps:
        now += 1.0
        gateway = gateways[which]
        name = f"{which}-{gateway.starts}"
        if what == "come":
            gateway.arrived += 1
        elif what in ("tell", "return"):
            demands.record_report(name, report(counts(gateway.arrived)), now - gateway.since, now)
            told[which, gateway.starts] = gateway.arrived
        elif what == "leave":
            demands.record_disconnect(name)
        elif what == "restart":
            demands.record_disconnect(name)
            gateway.restart(now)
        else:
            sums = demands.pop_demand(now)
            assert all(value >= 0 for m in sums.values() for c in m.values() for value in (c.arrived_requests,))
            taken += sum(c.arrived_requests for m in sums.values() for c in m.values())
    taken += sum(c.arrived_requests for m in demands.pop_demand(now + 1).values() for c in m.values())
    assert taken == sum(told.values())


def test_a_controller_that_comes_back_counts_from_what_it_hears_first() -> None:
    """A new controller does not count the calls that arrived at a gateway before the gateway's first report. If a
    gateway starts later than the controller, all of its calls count."""
    demands = DemandTotals(now=1000.0)
    demands.record_report("old", report(counts(5000)), counting_s=900.0, now=1000.5)
    assert demands.pop_demand(1001.0)["m"]["c"].arrived_requests == 0
    demands.record_report("old", report(counts(5003, within_slo=2)), counting_s=901.5, now=1001.5)
    demands.record_report("new", report(counts(4)), counting_s=0.3, now=1001.6)
    sums = demands.pop_demand(1002.0)["m"]["c"]
    assert (sums.arrived_requests, sums.arrived_prompt_tokens, sums.expected_output_tokens) == (7, 70, 140)
    assert sums.within_slo == 2


def test_what_waits_is_summed_and_goes_with_its_gateway() -> None:
    """Waiting calls of all gateways are summed, with the longest wait and the nearest deadline.

    The waiting calls of a disconnected gateway are dropped.
    """
    demands = DemandTotals(0.0)
    waits = {"queued_requests": 2, "queued_tokens": 30, "oldest_wait_s": 4.0, "held_requests": 2}
    assert demands.record_report("a", report(counts(2, **waits)), 1.0, 1.0), "somebody is held now"
    assert not demands.record_report("a", report(counts(2, **waits)), 1.5, 1.5), "they were before"
    demands.record_report(
        "b", report(counts(1, queued_requests=1, nearest_deadline_s=0.5, oldest_wait_s=1.0)), 1.0, 1.0
    )
    both = demands.pop_demand(2.0)["m"]["c"]
    assert (both.queued_requests, both.queued_tokens, both.held_requests) == (3, 30, 2)
    assert (both.oldest_wait_s, both.nearest_deadline_s) == (4.0, 0.5)
    demands.record_disconnect("a")
    alone = demands.pop_demand(3.0)["m"]["c"]
    assert (alone.queued_requests, alone.held_requests, alone.arrived_requests) == (1, 0, 0)
    demands.pop_demand(2.0 + FORGET_S)
    assert repr(demands) == "DemandTotals(1 gateways)"


def test_a_model_that_a_gateway_has_forgotten_waits_no_more() -> None:
    """If a gateway no longer reports a model, no calls for the model count as waiting at this gateway. The last values
    of the model's counters are kept for later reports."""
    demands = DemandTotals(0.0)
    demands.record_report("a", report(counts(3, queued_requests=3)), 1.0, 1.0)
    demands.record_report("a", [], 2.0, 2.0)
    assert demands.pop_demand(2.5)["m"]["c"].queued_requests == 0
    demands.record_report("a", report(counts(4)), 3.0, 3.0)
    assert demands.pop_demand(3.5)["m"]["c"].arrived_requests == 1
