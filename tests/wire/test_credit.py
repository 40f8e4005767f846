"""The capacity that a worker has promised to gateways never exceeds its capacity, for any order of grants, requests,
acknowledgements and new links.
"""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from cluster.wire.credit import Capacity, CreditBalance, CreditGranter

pytestmark = pytest.mark.slow

CAPACITY = Capacity(12, 4000)


class _Gateway:
    def __init__(self) -> None:
        self.purse = CreditBalance()
        self.inbox: list[tuple[int, int, int]] = []  # grants in transit
        self.acks: list[int] = []
        self.submits: list[int] = []  # submits in transit


class CreditMachine(RuleBasedStateMachine):
    """A worker and some gateways, with messages in transit. Free capacity changes as requests start and end."""

    def __init__(self) -> None:
        super().__init__()
        self.granter = CreditGranter()
        self.gateways: dict[int, _Gateway] = {}
        self.running: list[int] = []
        self.count = 0
        self.begins = CAPACITY.sequences  # the number of sequences that may start in a step

    def room(self) -> Capacity:
        return Capacity(CAPACITY.sequences - len(self.running), CAPACITY.tokens - sum(self.running))

    def regrant(self) -> None:
        room = self.room()
        begins = min(room.sequences, self.begins)
        for grant in self.granter.new_grants(Capacity(begins, room.tokens), room.sequences):
            self.gateways[grant.link].inbox.append((grant.grant_id, grant.sequences, grant.tokens))

    @precondition(lambda self: len(self.gateways) < 4)
    @rule()
    def attach(self) -> None:
        self.count += 1
        self.granter.attach(self.count)
        self.gateways[self.count] = _Gateway()
        self.regrant()

    @precondition(lambda self: self.gateways)
    @rule(data=st.data())
    def detach(self, data: st.DataObject) -> None:
        link = data.draw(st.sampled_from(sorted(self.gateways)))
        del self.gateways[link]
        self.granter.detach(link)
        self.regrant()

    @precondition(lambda self: self.gateways)
    @rule(data=st.data(), waiting=st.integers(0, 50), kept=st.integers(0, 60))
    def backlog(self, data: st.DataObject, waiting: int, kept: int) -> None:
        link = data.draw(st.sampled_from(sorted(self.gateways)))
        self.granter.set_backlog(link, waiting, kept)
        self.regrant()

    @rule(begins=st.integers(0, CAPACITY.sequences))
    def can_begin(self, begins: int) -> None:
        self.begins = begins
        self.regrant()

    @precondition(lambda self: self.gateways)
    @rule(data=st.data(), tokens=st.integers(1, 800))
    def submit(self, data: st.DataObject, tokens: int) -> None:
        gateway = self.gateways[data.draw(st.sampled_from(sorted(self.gateways)))]
        free = gateway.purse.free
        if free.sequences >= 1 and free.tokens >= tokens:
            gateway.purse.spend(tokens)
            gateway.submits.append(tokens)

    @precondition(lambda self: self.gateways)
    @rule(data=st.data())
    def deliver(self, data: st.DataObject) -> None:
        link = data.draw(st.sampled_from(sorted(self.gateways)))
        gateway = self.gateways[link]
        if gateway.submits:
            tokens = gateway.submits.pop(0)
            self.granter.record_submit(link, tokens)
            self.running.append(tokens)
        if gateway.inbox:
            grant_id, sequences, tokens = gateway.inbox.pop(0)
            gateway.purse.apply_credit(grant_id, sequences, tokens)
            gateway.acks.append(grant_id)
        elif gateway.acks and not gateway.submits:  # an ack follows the submits sent before it
            self.granter.acknowledge(link, gateway.acks.pop(0))
        self.regrant()

    @precondition(lambda self: self.running)
    @rule()
    def finish(self) -> None:
        self.running.pop(0)
        self.regrant()

    @invariant()
    def never_more_than_room(self) -> None:
        in_flight = sum(len(g.submits) for g in self.gateways.values())
        free = sum(g.purse.free.sequences for g in self.gateways.values())
        assert len(self.running) + in_flight + free <= CAPACITY.sequences
        tokens = sum(sum(g.submits) + g.purse.free.tokens for g in self.gateways.values())
        assert sum(self.running) + tokens <= CAPACITY.tokens

    @invariant()
    def promised_covers_purses(self) -> None:
        promised = self.granter.promised()
        assert promised.sequences <= max(self.room().sequences, 0)


CreditMachine.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestCredit = CreditMachine.TestCase


def test_all_room_goes_to_the_only_link() -> None:
    """A single gateway gets all the capacity of a worker."""
    granter = CreditGranter()
    granter.attach(1)
    (grant,) = granter.new_grants(Capacity(10, 1000))
    assert (grant.sequences, grant.tokens) == (10, 1000)


def test_room_follows_the_backlog_once_it_is_given_back() -> None:
    """If one gateway has a backlog and the other holds unused capacity, the capacity moves to the first gateway after
    the second has acknowledged a lower limit."""
    granter = CreditGranter()
    granter.attach(1)
    granter.new_grants(Capacity(10, 1000))
    granter.attach(2)
    granter.set_backlog(2, 5)
    grants = {g.link: g for g in granter.new_grants(Capacity(10, 1000))}
    assert grants[1].sequences == 0
    assert 2 not in grants, "no capacity is free before the first gateway has acknowledged"
    granter.acknowledge(1, grants[1].grant_id)
    (grant,) = granter.new_grants(Capacity(10, 1000))
    assert (grant.link, grant.sequences, grant.tokens) == (2, 10, 1000)


def test_calls_whose_blocks_are_here_get_any_place() -> None:
    """For waiting calls whose KV blocks are on this worker, a gateway gets credit in addition to its share of the
    worker's usual capacity, as long as all grants together have at most `places` sequences."""
    granter = CreditGranter()
    for link, waiting, kept in ((1, 5, 0), (2, 7, 6), (3, 9, 9)):
        granter.attach(link)
        granter.set_backlog(link, waiting, kept)
    grants = {g.link: g.sequences for g in granter.new_grants(Capacity(6, 10_000), places=40)}
    assert grants == {1: 5, 2: 1 + 6, 3: 9}, "other calls share the six as if those were not there"
    granter.set_backlog(3, 0)
    grants = {g.link: g.sequences for g in granter.new_grants(Capacity(6, 10_000), places=9)}
    assert grants == {1: 3, 2: 3 + 3, 3: 0}, "three places beyond the six; the rest of them compete like other calls"


def test_calls_whose_blocks_are_here_claim_like_others_where_there_are_no_more_places() -> None:
    """A worker may grant more sequences than its free capacity, up to `places`, but only for calls whose KV blocks it
    holds. If `places` is not above the free capacity, these calls share the free capacity with all other calls."""
    for waiting, room, expected in ((0, 1, {2: 1}), (5, 4, {1: 2, 2: 2})):
        granter = CreditGranter()
        granter.attach(1)
        granter.attach(2)
        granter.set_backlog(1, waiting)
        granter.set_backlog(2, 5, 5)
        assert {g.link: g.sequences for g in granter.new_grants(Capacity(room, 1000), places=room)} == expected


def test_each_that_has_come_back_waits_no_more() -> None:
    """The backlog of a gateway includes the number of waiting calls whose KV blocks are on this worker. When such a
    call arrives, that number falls by one."""
    granter = CreditGranter()
    granter.attach(1)
    granter.set_backlog(1, 5, 5)
    granter.new_grants(Capacity(1, 1000), places=1)
    granter.record_submit(1, 10, kept=True)
    (grant,) = granter.new_grants(Capacity(0, 1000), places=40)
    assert grant.sequences == 1 + 4


def test_a_limit_holds_until_a_later_one_is_acknowledged() -> None:
    """Until the gateway acknowledges a lower limit, the higher limit counts as promised: the gateway may still use
    it."""
    granter = CreditGranter()
    granter.attach(1)
    (first,) = granter.new_grants(Capacity(10, 1000))
    granter.attach(2)
    granter.set_backlog(2, 5)
    (lower,) = granter.new_grants(Capacity(10, 1000))
    assert (lower.link, lower.sequences) == (1, 0)
    granter.acknowledge(1, first.grant_id)  # sent before the lower limit arrived
    assert granter.promised().sequences == 10
    assert granter.new_grants(Capacity(10, 1000)) == [], "the first gateway may still send ten"
    granter.acknowledge(1, lower.grant_id)
    assert [(g.link, g.sequences) for g in granter.new_grants(Capacity(10, 1000))] == [(2, 10)]
