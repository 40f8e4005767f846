"""Tests of the fair queue. While any sequence waits, one of them is next. The service counters of waiting tenants
differ by at most a fixed bound, and no tenant starves. All gateways arrive at equal service counters. The tests also
cover expected output lengths and the shedding of sequences from a full waiting room."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from cluster.api.outcomes import Outcome
from cluster.policy.fairness.fair_queue import DEFICIT_TOKENS, FairOrder, FairOrders
from cluster.policy.fairness.output_lengths import KEPT, LearntMeans, LearntOutputs
from cluster.policy.fairness.served_tokens import ServedMeter
from cluster.policy.fairness.service_counters import MAX_HOLES, QUANTUM, FifoQueue, FlowKey
from cluster.policy.fairness.token_cost import Charge, ServiceWeights
from cluster.policy.fairness.waiting_room import WaitingRoom, WaitingSequence

SERVICE = ServiceWeights()


def call(
    call_id: str, tenant: str = "a", *, tokens: int = 100, output: int = 0, rank: int = 0, arrived: float = 0.0
) -> WaitingSequence:
    """Return a waiting sequence."""
    return WaitingSequence(call_id, "m", tenant, tokens, None, "standard", arrived, rank, 0, output)


def order_of(*calls: WaitingSequence, weights: dict[str, float] | None = None) -> FairOrder:
    """Return a fair order in which these sequences wait."""
    given = weights or {}
    order = FairOrder(weight_of=lambda tenant: given.get(tenant, 1.0))
    for one in calls:
        order.push(one, 0.0)
    return order


def turns(order: FairOrder, count: int, now: float = 0.0) -> list[str]:
    """Take the next `count` turns, and return the call ids in the order of the turns."""
    out = []
    for _ in range(count):
        head = order.head()
        assert head is not None
        order.mark_taken(head.call_id, now)
        out.append(head.call_id)
    return out


def test_turns_go_by_weighted_service() -> None:
    """A tenant of weight 2 gets two turns for each turn of a tenant of weight 1, however many sequences wait."""
    calls = [call(f"a{i}", "a") for i in range(20)] + [call(f"b{i}", "b") for i in range(20)]
    taken = turns(order_of(*calls, weights={"a": 2.0}), 15)
    assert sum(1 for one in taken if one[0] == "a") == 10


def test_long_outputs_have_fewer_turns() -> None:
    """A tenant whose calls cost eight times as much gets an eighth of the turns, because tokens are shared, not
    calls."""
    calls = [call(f"l{i}", "l", tokens=100, output=350) for i in range(40)] + [call(f"s{i}", "s") for i in range(80)]
    taken = turns(order_of(*calls), 90)
    assert sum(1 for one in taken if one[0] == "l") == 10


def test_a_higher_class_goes_first_whatever_it_had() -> None:
    """A sequence of rank 0 always goes before a sequence of rank 1."""
    order = order_of(call("b", "b", rank=1), *[call(f"a{i}", "a", tokens=5000) for i in range(5)])
    assert turns(order, 6)[-1] == "b"


def test_coming_back_from_idle_saves_nothing_up() -> None:
    """When a tenant returns from idle, its service counter is raised to the lowest counter of the tenants that wait.

    So the tenant does not get many turns in a row.
    """
    order = order_of(*[call(f"a{i}", "a") for i in range(200)])
    turns(order, 100)
    for i in range(20):
        order.push(call(f"b{i}", "b"), 100.0)
    assert order.counter("b") == order.counter("a")
    taken = turns(order, 20, 100.0)
    assert 9 <= sum(1 for one in taken if one[0] == "b") <= 11


def test_a_short_pause_is_no_way_to_save_up_either() -> None:
    """A tenant that pauses for less than two seconds cannot save up service: when it sends again, its service counter
    is raised if it is further behind the other tenants than DEFICIT_TOKENS."""
    order = order_of(call("b", "b"), *[call(f"a{i}", "a", tokens=1000) for i in range(200)])
    turns(order, 100, 0.0)
    order.push(call("again", "b"), 1.0)
    assert order.counter("a") - order.counter("b") == pytest.approx(DEFICIT_TOKENS)


def test_one_put_back_goes_first_and_is_charged_once() -> None:
    """A sequence that lost its worker is put back and goes first. It is charged only once."""
    order = order_of(*[call(f"a{i}", "a", output=10) for i in range(3)], call("b", "b"))
    first = turns(order, 1)[0]
    before = order.counter("a")
    order.put_back(call(first, "a", output=10))
    assert order.position(first) == 0
    assert turns(order, 1) == [first]
    assert order.counter("a") == before
    order.generated(first, 4)
    order.ended(first)
    assert order.counter("a") == before - 6 * SERVICE.output


def test_corrections_end_at_the_truth() -> None:
    """When a call has ended, its tenant's service counter contains the cost of the tokens that were really computed.

    The first call is predicted with 100 output tokens and no cached tokens, and ends with 130 output tokens and 60
    cached tokens. The second call is taken back before it runs, and costs nothing.
    """
    order = order_of(call("x", "a", tokens=100, output=100), call("y", "a", tokens=10))
    turns(order, 1)
    assert order.counter("a") == 300.0
    order.cached("x", 60)
    for tokens in range(131):
        order.generated("x", tokens)
    order.ended("x")
    order.ended("x")
    assert order.counter("a") == pytest.approx(40 + 6 + 260)
    turns(order, 1)
    order.revoked("y")
    assert order.counter("a") == pytest.approx(306)
    assert order.statistics().open_charges == 0


def test_tenants_at_their_floor_are_forgotten() -> None:
    """An idle tenant is forgotten if its service counter is at the floor. The floor is the lowest counter among the
    waiting tenants. A tenant that begins to wait later starts at the last value of the floor."""
    order = order_of(*[call(f"{i}", f"t{i}") for i in range(100)], call("debtor", "d", tokens=100_000))
    turns(order, 101)
    for call_id in [*(str(i) for i in range(100)), "debtor"]:
        order.ended(call_id)
    for i in range(4):
        order.push(call(f"x{i}", "x", rank=1), 10.0)
    order.sweep(10.0)
    assert order.statistics().flows == 1
    order.push(call("new", "n"), 11.0)
    order.push(call("again", "d"), 11.0)
    assert order.counter("n") == order.counter("d") == 100_000


def test_orders_outlive_an_empty_room() -> None:
    """The service counters of a model are kept while no sequence of the model waits. If the model leaves the catalog,
    they are forgotten once the charges of all its calls are settled."""
    fair = FairOrders()
    room = WaitingRoom(max_requests=9, max_tokens=10**6, max_wait_s=60.0, order_of=fair.order)
    room.admit(call("x"), 0.0)
    assert room.pop_next("m", lambda _: True, 0.0) is not None
    assert fair.order("m").counter("a") == 100.0
    fair.retain_models([])
    assert "1 models" in repr(fair)
    fair.order("m").ended("x")
    fair.retain_models([])
    assert "0 models" in repr(fair)


@given(
    st.lists(st.tuples(st.sampled_from("ab"), st.integers(0, 50), st.integers(0, 50)), max_size=30),
    st.data(),
)
@settings(max_examples=100, deadline=None)
def test_gateways_and_workers_agree(calls: list[tuple[str, int, int]], data: st.DataObject) -> None:
    """Two gateways that send to two workers have equal service counters after all reports, whatever the order of the
    reports."""
    gateways = [FairOrder(), FairOrder()]
    meters = [ServedMeter(), ServedMeter()]
    for meter in meters:
        meter.attach(0)
        meter.attach(1)
    for gateway in gateways:
        for name in "01":
            gateway.worker_totals.apply(name, "i", [], 0.0)
        for tenant in "ab":
            gateway.push(call(f"always-{tenant}", tenant), 0.0)  # no tenant is lifted
    for number, (tenant, predicted, actual) in enumerate(calls):
        at, worker = data.draw(st.sampled_from([0, 1])), data.draw(st.sampled_from([0, 1]))
        gateway, call_id = gateways[at], str(number)
        gateway.push(call(call_id, tenant, output=predicted), 0.0)
        gateway.mark_taken(call_id, 0.0)
        meters[worker].accepted(call_id, at, FlowKey(0, tenant), Charge(SERVICE, 100, 0, predicted))
        account: FairOrder | ServedMeter
        for account in (gateway, meters[worker]):
            account.cached(call_id, 20)
            account.generated(call_id, actual)
            account.ended(call_id)
        if data.draw(st.booleans()):
            gateways[0].worker_totals.apply(str(worker), "i", meters[worker].report(0), 0.0)
    for worker in (0, 1):
        for at in (0, 1):
            gateways[at].worker_totals.apply(str(worker), "i", meters[worker].report(at), 0.0)
    for tenant in "ab":
        assert gateways[0].counter(tenant) == pytest.approx(gateways[1].counter(tenant))


@given(
    st.lists(st.tuples(st.integers(1, 200), st.integers(0, 100)), min_size=2, max_size=5),
    st.integers(10, 120),
    st.lists(st.sampled_from([1.0, 2.0, 0.5]), min_size=5, max_size=5),
)
@settings(max_examples=100, deadline=None)
def test_the_gap_of_backlogged_tenants_is_bounded(
    costs: list[tuple[int, int]], picks: int, weights: list[float]
) -> None:
    """The service counters of two waiting tenants differ by at most one QUANTUM plus the largest charge. A charge is
    divided by the weight of its tenant."""
    names = [f"t{i}" for i in range(len(costs))]
    by_name = dict(zip(names, weights, strict=False))
    calls = [
        call(f"{name}-{i}", name, tokens=tokens, output=output)
        for name, (tokens, output) in zip(names, costs, strict=True)
        for i in range(picks + 1)
    ]
    order = order_of(*calls, weights=by_name)
    largest = max((t + 2 * o) / by_name[n] for n, (t, o) in zip(names, costs, strict=True))
    for _ in range(picks):
        turns(order, 1)
        counters = [order.counter(name) for name in names]
        assert max(counters) - min(counters) <= largest + QUANTUM


class FairMachine(RuleBasedStateMachine):
    """State machine of a fair order with two priority classes, compared with plain lists.

    Calls arrive, get their turn, are put back, are cancelled and end.
    """

    def __init__(self) -> None:
        super().__init__()
        self.order = FairOrder()
        self.now = 0.0
        self.serial = 0
        self.lines: dict[tuple[int, str], list[WaitingSequence]] = {}
        self.returned: list[WaitingSequence] = []
        self.running: list[WaitingSequence] = []

    @rule(
        tenant=st.sampled_from("abc"),
        rank=st.sampled_from([0, 1]),
        tokens=st.integers(0, 300),
        output=st.integers(0, 90),
    )
    def push(self, tenant: str, rank: int, tokens: int, output: int) -> None:
        """Add a new call. `rank`: its priority class. `tokens`: length of its prompt. `output`: expected length of its
        output."""
        self.serial += 1
        one = call(str(self.serial), tenant, tokens=tokens, output=output, rank=rank, arrived=self.now)
        self.order.push(one, self.now)
        self.lines.setdefault((rank, tenant), []).append(one)

    @rule()
    def turn(self) -> None:
        """Give the next turn and check which call gets it. Calls that were put back come first. Otherwise it is the
        first call of a tenant in the highest class with waiting calls. This tenant's counter is at most QUANTUM above
        the lowest counter in the class."""
        head = self.order.head()
        waiting = {key: line for key, line in self.lines.items() if line}
        if self.returned:
            assert head == min(self.returned, key=lambda w: (w.rank, w.arrived))
            self.returned.remove(head)
        elif waiting:
            rank = min(key[0] for key in waiting)
            assert head is not None
            assert head == self.lines[head.rank, head.tenant][0]
            least = min(self.order.counter(tenant, r) for r, tenant in waiting if r == rank)
            assert head.rank == rank
            assert self.order.counter(head.tenant, rank) <= least + QUANTUM
            self.lines[head.rank, head.tenant].pop(0)
        else:
            assert head is None
            return
        before = self.order.counter(head.tenant, head.rank)
        self.order.mark_taken(head.call_id, self.now)
        assert self.order.counter(head.tenant, head.rank) >= before
        self.running.append(head)

    @rule(data=st.data(), what=st.sampled_from(["back", "end", "revoke"]), tokens=st.integers(0, 150))
    def running_one(self, data: st.DataObject, what: str, tokens: int) -> None:
        """Let a running call generate `tokens` tokens. Then, as `what` says, put the call back into the queue (`back`),
        refund its charge (`revoke`) or end it (`end`)."""
        if not self.running:
            return
        one = data.draw(st.sampled_from(self.running))
        self.running.remove(one)
        self.order.generated(one.call_id, tokens)
        if what == "back" and one.arrived not in [w.arrived for w in self.returned]:
            self.order.put_back(one)
            self.returned.append(one)
        elif what == "revoke":
            self.order.revoked(one.call_id)
        else:
            self.order.ended(one.call_id)

    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        """Cancel a waiting call."""
        there = self.returned + [w for line in self.lines.values() for w in line]
        if there:
            one = data.draw(st.sampled_from(there))
            self.order.remove(one.call_id)
            (self.returned if one in self.returned else self.lines[one.rank, one.tenant]).remove(one)

    @rule(seconds=st.sampled_from([0.1, 1.5, 3.0]))
    def pass_time(self, seconds: float) -> None:
        """Advance the time."""
        self.now += seconds
        self.order.sweep(self.now)

    @invariant()
    def counts_and_positions(self) -> None:
        """The order has a first sequence if and only if a sequence waits. Positions are right within the queue of each
        tenant."""
        waiting = len(self.returned) + sum(len(line) for line in self.lines.values())
        assert self.order.statistics().waiting == waiting
        assert (self.order.head() is not None) == (waiting > 0)
        assert self.order.statistics().open_charges == len(self.running) + len(self.returned)
        assert sum(b.requests for b in self.order.backlogs.own().values()) == waiting
        for (rank, tenant), line in self.lines.items():
            own = sum(1 for w in self.returned if (w.rank, w.tenant) == (rank, tenant))
            assert [self.order.position(w.call_id) for w in line] == [own + i for i in range(len(line))]


FairMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestFair = FairMachine.TestCase


@given(st.lists(st.integers(0, 3), max_size=60))
def test_nobody_starves(arrivals: list[int]) -> None:
    """One tenant floods the queue with calls, and another tenant has a single call of the same cost. This single call
    waits for at most two calls of the flood, however many there are."""
    order = order_of(call("small", "s", tokens=100))
    order.push(call("flood", "f", tokens=100), 0.0)
    served = 0
    for at, more in enumerate(arrivals):
        for i in range(more + 1):
            order.push(call(f"{at}-{i}", "f", tokens=100), 0.0)
        if turns(order, 1) == ["small"]:
            break
        served += 1
    assert served <= 2


@given(st.lists(st.one_of(st.none(), st.integers(0, 200)), max_size=300), st.integers(0, 200))
def test_a_line_agrees_with_a_list(steps: list[int | None], begin: int) -> None:
    """After any sequence of pushes and removals, the FIFO queue agrees with a list, and it has room for hardly more
    entries than wait. `steps`: None for a push, or the index of the waiting entry to remove. `begin`: number of
    entries before the first step."""
    line = FifoQueue()
    waiting = [(str(-number), line.push(call(str(-number)))) for number in range(begin)]
    for number, step in enumerate(steps):
        if step is None:
            waiting.append((str(number), line.push(call(str(number)))))
        elif waiting:
            line.remove(waiting.pop(step % len(waiting))[1])
        head = line.head()
        assert (head.call_id if head is not None else None) == (waiting[0][0] if waiting else None)
        assert [each.call_id for each in line.first(3)] == [call_id for call_id, _ in waiting[:3]]
        assert len(line) == len(waiting)
        assert [line.position(serial) for _, serial in waiting] == list(range(len(waiting)))
        assert len(line._entries) <= 2 * (len(waiting) + MAX_HOLES) + 1


@pytest.mark.parametrize("first", ["oldest", "newest", "random"])
def test_those_who_left_cost_nothing(first: str) -> None:
    """A sequence at the head waits while many others enter and leave behind it, in any order. Their places are
    dropped, and a turn looks at a bounded number of them."""
    line, chance = FifoQueue(), random.Random(1)
    line.push(call("stuck"))
    serials = [line.push(call(str(number))) for number in range(2000)]
    serials.sort(key={"oldest": lambda at: at, "newest": lambda at: -at, "random": lambda _: chance.random()}[first])
    for serial in serials[:-1]:
        line.remove(serial)
        line.first(16)
        assert len(line._entries) <= 2 * (len(line) + MAX_HOLES) + 1
    assert len(line.first(16)) == 2
    for _ in range(2000):
        line.remove(line.push(call("churn")))
    assert len(line._entries) <= 2 + MAX_HOLES


def test_learnt_outputs() -> None:
    """The mean and the p95 of output lengths are computed from the newest KEPT outputs of a tenant and model. A call's
    `max_tokens` is an upper bound on both values. The number of remembered pairs of tenant and model is bounded."""
    learnt, means = LearntOutputs(default_tokens=50, max_pairs=2), LearntMeans(max_pairs=2)
    assert (means.mean("a", "m", 1000), learnt.p95("a", "m", 20)) == (1, 20)
    for tokens in [1000] * 10 + [10] * (KEPT - 4) + [100] * 4:
        learnt.observe("a", "m", tokens)
        means.observe("a", "m", tokens)
    assert means.mean("a", "m", 1000) == round((10 * (KEPT - 4) + 400) / KEPT)
    assert means.mean("a", "m", 3) == 3
    assert learnt.p95("a", "m", 1000) == 100
    for tenant in "bc":
        learnt.observe(tenant, "m", 7)
        means.observe(tenant, "m", 7)
    assert learnt.p95("a", "m", 1000) == 50
    assert (means.mean("a", "m", 1000), means.mean("c", "m", 1000)) == (1, 7)


def test_outputs_that_all_run_to_their_most_are_expected_to_do_so() -> None:
    """If all outputs of a tenant so far were as long as max_tokens allowed, the next output is expected to have
    max_tokens tokens, too.

    The expectation is at most the longest output so far plus `default_tokens`.
    """
    learnt = LearntOutputs(default_tokens=50)
    for most in (10, 1000, 200, 3000) * 8:
        learnt.observe("a", "m", most, cut=True)
    assert [learnt.expected("a", "m", most) for most in (5, 10, 150, 3000, 3020, 9000)] == [
        5,
        10,
        150,
        3000,
        3020,
        3050,
    ]


@given(st.lists(st.integers(1, 300), min_size=1, max_size=KEPT), st.integers(1, 400))
def test_what_ends_by_itself_is_expected_as_long_as_it_was(lengths: list[int], most: int) -> None:
    """If outputs ended before max_tokens, the expected length is the mean of their lengths, each limited to `most`."""
    learnt = LearntOutputs()
    for tokens in lengths:
        learnt.observe("a", "m", tokens)
    learnt._pairs["a", "m"]._curve()
    expected = sum(min(tokens, most) for tokens in lengths) / len(lengths)
    assert abs(learnt.expected("a", "m", most) - max(expected, 1.0)) <= 0.5 + 1e-6


def test_of_whom_nothing_was_seen_others_tell() -> None:
    """The expected output of a tenant without outputs is taken from other tenants: on the same model, else on all
    models, else it is the default.

    Limits use the p95, which is computed only from the tenant's own outputs.
    """
    learnt = LearntOutputs(default_tokens=50)
    assert learnt.expected("a", "m", 1000) == 50
    for _ in range(KEPT):
        learnt.observe("a", "m", 10)
    assert (learnt.expected("b", "m", 1000), learnt.expected("b", "n", 1000)) == (10, 10)
    for _ in range(KEPT // 2):
        learnt.observe("b", "n", 30)
    assert (learnt.expected("c", "m", 1000), learnt.expected("c", "n", 1000), learnt.expected("c", "o", 1000)) == (
        10,
        30,
        20,
    )
    assert learnt.p95("c", "m", 1000) == 50


def test_what_was_cut_short_says_no_more_than_it_had() -> None:
    """An output that was cut at max_tokens gives only a lower bound of its length.

    Half of the outputs are cut at 10 tokens and half end at 40 tokens. A call with max_tokens 40 is then expected to
    have 40 tokens, not 25.
    """
    learnt = LearntOutputs()
    for _ in range(KEPT // 2):
        learnt.observe("a", "m", 10, cut=True)
        learnt.observe("a", "m", 40)
    assert (learnt.expected("a", "m", 500), learnt.expected("a", "m", 10)) == (40, 10)


def shedding(max_requests: int = 4) -> WaitingRoom:
    """Return a small waiting room."""
    return WaitingRoom(max_requests=max_requests, max_tokens=10_000, max_wait_s=60.0, order_of=FairOrders().order)


def test_a_full_room_sheds_the_lowest_class_first() -> None:
    """When the waiting room is full, a sequence of the lowest class is shed for a sequence of a higher class. For a
    sequence of the lowest class, no sequence is shed."""
    room = shedding()
    for i, rank in enumerate((2, 0, 2, 1)):
        room.admit(call(str(i), f"t{i}", rank=rank), 0.0)
    got = room.admit(call("new", "n", rank=1), 0.0)
    assert got.outcome is None
    assert [w.call_id for w in got.shed] in (["0"], ["2"])
    assert room.admit(call("low", "l", rank=2), 0.0).outcome is Outcome.QUEUE_FULL
    s = room.statistics()
    assert (s.requests, s.shed, s.refused) == (4, 1, 1)


def test_a_flood_makes_room_for_others_of_its_class() -> None:
    """If the waiting room is full, a new sequence replaces the last sequence of the longest queue of its class. A new
    sequence of the tenant with the longest queue is refused instead."""
    room = shedding()
    for i in range(4):
        assert room.admit(call(f"f{i}", "flood"), 0.0).outcome is None
    assert room.admit(call("f4", "flood"), 0.0).outcome is Outcome.QUEUE_FULL
    got = room.admit(call("b", "b"), 0.0)
    assert [w.call_id for w in got.shed] == ["f3"]
    assert room.position("f3") is None
    assert room.admit(call("c", "c"), 0.0).shed[0].call_id == "f2"
    assert room.admit(call("d", "d"), 0.0).outcome is None or room.statistics().requests == 4


def test_what_cannot_be_in_time_is_refused_at_once() -> None:
    """A call is refused at once if its earliest possible start is not before its deadline. A call without a deadline is
    not refused."""
    room = shedding()
    late = WaitingSequence("x", "m", "a", 1, 5.0, "standard", 0.0)
    assert room.admit(late, 0.0, starts_in_s=5.0).outcome is Outcome.DEADLINE_UNREACHABLE
    assert room.admit(late, 0.0, starts_in_s=4.9).outcome is None
    assert room.admit(call("y"), 0.0, starts_in_s=1e9).outcome is None


def test_a_tenants_own_bounds() -> None:
    """A sequence is refused if its tenant's own queue is full. No other sequence is removed to make room for it."""
    room = WaitingRoom(
        max_requests=9, max_tokens=900, max_wait_s=9.0, tenant_max_requests=2, tenant_max_tokens=150,
        order_of=FairOrders().order,
    )  # fmt: skip
    assert room.admit(call("a"), 0.0).outcome is None
    assert room.admit(call("b"), 0.0).outcome is Outcome.RATE_LIMITED
    assert room.admit(call("c", tokens=50), 0.0).outcome is None
    assert room.admit(call("d", tokens=0), 0.0).outcome is Outcome.RATE_LIMITED
    assert room.admit(call("e", "other"), 0.0).outcome is None
