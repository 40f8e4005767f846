"""Reports of workers beside the outputs of their requests: applied in slices, and charged to the worker's model."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from cluster.api.types import EngineInfo, WorkerIdentity
from cluster.gateway.links.liveness import LinkLiveness
from cluster.gateway.links.report_costs import BURST_S, MAX_MODELS, PER_REQUEST, POOL_RATE, RATE, ReportCosts
from cluster.gateway.links.worker_link import FLOW_SLICE, USAGE_SLICE, WorkerLink
from cluster.gateway.scheduling.service_charges import MAX_STRANGERS, ServiceCharges
from cluster.link.v1 import link_pb2 as pb
from cluster.observe.metrics import Metrics
from cluster.policy.fairness.peer_backlog import ServedTotal
from cluster.wire.codecs.fairness_codec import FlowBacklog, WeightedValue
from cluster.wire.ended_requests import EndedUsage
from cluster.wire.link_bounds import MAX_FLOWS, MAX_REPORTS
from tests.support.links import NoListener

INFO = EngineInfo("c", "sim", "0", 16, 64, 8, 64, 2048, 256)
WORKER = WorkerIdentity("w", "i", "m")


class Listener(NoListener):
    """A listener that counts what it gets at once."""

    def __init__(self) -> None:
        self.slices: list[int] = []
        self.continued = 0

    def usage(self, link: WorkerLink, ended: Sequence[EndedUsage]) -> None:
        self.slices.append(len(ended))

    def served(
        self, link: WorkerLink, totals: Sequence[WeightedValue[ServedTotal]], *, continues: bool = False
    ) -> None:
        self.slices.append(len(totals))
        self.continued += continues

    def peer_backlog(self, link: WorkerLink, gateway: str, waiting: Sequence[WeightedValue[FlowBacklog]]) -> None:
        self.slices.append(len(waiting))


def make_link(listener: Listener) -> WorkerLink:
    """Return a link whose reports go to the listener."""
    return WorkerLink(WORKER, INFO, 1, listener, LinkLiveness(0.0, 1.0, 1.0))


def test_long_reports_are_applied_in_slices() -> None:
    """Between two slices of a long report other tasks can run. The end of the link stops all but usage."""
    listener = Listener()
    link = make_link(listener)
    flows = [pb.ServedFlow(tenant_handle=f"t{n}") for n in range(2 * FLOW_SLICE)]
    turn = pb.WorkerTurn(usage=[pb.Usage()] * MAX_REPORTS, served=pb.Served(flows=flows))
    before = 0
    for _ in link.apply_reports(turn):
        assert len(listener.slices) <= before + 2
        before = len(listener.slices)
    assert max(listener.slices) <= FLOW_SLICE
    assert sum(listener.slices) == MAX_REPORTS + len(flows)
    assert listener.continued == 1, "the second slice belongs to the same report"
    assert link.cost > MAX_REPORTS
    listener.slices.clear()
    slices = link.apply_reports(turn)
    next(slices)
    link.end("gone")
    list(slices)
    assert sum(listener.slices) <= MAX_REPORTS + FLOW_SLICE
    assert sum(each for each in listener.slices if each <= USAGE_SLICE) == MAX_REPORTS


@pytest.mark.parametrize(
    "turn",
    [
        pb.WorkerTurn(usage=[pb.Usage()] * (MAX_REPORTS + 1)),
        pb.WorkerTurn(served=pb.Served(flows=[pb.ServedFlow()] * (MAX_FLOWS + 1))),
        pb.WorkerTurn(elsewhere=[pb.Elsewhere(flows=[pb.FlowBacklog()] * (MAX_FLOWS // 2))] * 3),
    ],
    ids=["usage", "served", "elsewhere"],
)
def test_reports_beyond_the_bounds_are_not_applied(turn: pb.WorkerTurn) -> None:
    """A message with too many reports is refused whole."""
    listener = Listener()
    with pytest.raises(ValueError, match="at most"):
        list(make_link(listener).apply_reports(turn))
    assert listener.slices == []


def test_a_flood_slows_its_own_model() -> None:
    """A model whose workers send reports without end is read at the rate of its own share and the pool. Another model's
    reports within its share are read at once."""
    now = 0.0
    costs = ReportCosts(lambda: now)
    spent = 0.0
    while now < 60:
        now += costs.charge("flood", 10_000.0)
        spent += 10_000.0
        assert costs.charge("calm", 10.0) == 0
        now += 0.001
    assert spent <= (RATE + POOL_RATE) * (now + BURST_S) + 10_000
    for number in range(2 * MAX_MODELS):
        costs.charge(f"m{number}", 1.0)
    assert len(costs._models) <= MAX_MODELS


def test_requests_pay_for_their_reports() -> None:
    """A worker that serves many requests is never slowed by the reports about them."""
    now = 0.0
    costs = ReportCosts(lambda: now)
    for _ in range(10_000):
        assert costs.charge("busy", -PER_REQUEST) == 0
        assert sum(costs.charge("busy", PER_REQUEST / 10) for _ in range(10)) == 0


def test_made_up_tenants_fill_no_memory() -> None:
    """Reports may name the tenants that this gateway knows, and a limited number of others. A known tenant's weight is
    the gateway's own."""
    known = {"mine": 4.0}
    charges = ServiceCharges({"standard": 0}, Metrics("test"), known.get)
    for number in range(3 * MAX_STRANGERS):
        totals = [WeightedValue(ServedTotal(rank, f"x{number}", 5.0, 0.0), 9.0) for rank in (0, 1, 1 << 31)]
        charges.served(WORKER, [*totals, WeightedValue(ServedTotal(0, "mine", 5.0 * number, 0.0), 0.1)], 1.0)
    order = charges.fair.order("m")
    assert order.statistics().flows <= MAX_STRANGERS + 1
    assert charges.weight_of("mine") == 4.0
    assert order.counter("mine") > 0
    assert sum(len(book) for _, book in order.worker_totals._workers.values()) <= MAX_STRANGERS + 1


def test_a_first_report_in_parts_adds_nothing() -> None:
    """The first report of a worker only sets the starting point, even if it is applied in parts."""
    charges = ServiceCharges({"standard": 0}, Metrics("test"))
    for number in range(3):
        totals = [WeightedValue(ServedTotal(0, f"t{number}", 50.0, 0.0), 1.0)]
        charges.served(WORKER, totals, 1.0, continues=number > 0)
    assert charges.fair.order("m").statistics().charged == 0
    charges.served(WORKER, [WeightedValue(ServedTotal(0, "t2", 60.0, 0.0), 1.0)], 1.0)
    assert charges.fair.order("m").counter("t2") == 10
