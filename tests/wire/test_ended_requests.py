"""A worker keeps the usage records of ended requests correctly, for any order of events."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from cluster.wire.ended_requests import EndedUsage, UsageKeeper

EVENTS = st.one_of(
    st.tuples(st.just("attach"), st.just(0)),
    st.tuples(st.just("detach"), st.integers(0, 3)),
    st.tuples(st.just("keep"), st.integers(0, 6)),
    st.tuples(st.just("take"), st.integers(0, 3)),
    st.tuples(st.just("ack"), st.integers(0, 5)),
    st.tuples(st.just("wait"), st.integers(1, 40)),
    st.tuples(st.just("hurry"), st.just(0)),
)


def ended(generated: int = 0) -> EndedUsage:
    """Return the usage of a request whose tokens were all sent."""
    return EndedUsage(b"sealed", generated_tokens=generated, written_tokens=generated)


@given(st.lists(EVENTS, max_size=120))
def test_nothing_is_lost_and_nothing_acknowledged_comes_back(events: list[tuple[str, int]]) -> None:
    """Each usage record is sent on some attached link until it is acknowledged, and never afterwards."""
    keeper = UsageKeeper(max_records=1000, patience_s=30)
    links: list[int] = []
    waiting: set[int] = set()
    sent: dict[int, set[int]] = {}
    acked: set[int] = set()
    now, number = 0.0, 0
    for name, value in events:
        if name == "attach":
            number += 1
            keeper.attach(number)
            links.append(number)
            sent[number] = set()
        elif name == "detach" and value < len(links):
            gone = links.pop(value)
            keeper.detach(gone, {})
            del sent[gone]
        elif name == "keep":
            waiting.add(keeper.keep(ended(), origin=value))
        elif name == "take" and value < len(links):
            taken = {usage.key for usage in keeper.pop_due(links[value], now, most=3)}
            assert taken <= waiting
            assert not taken & acked
            sent[links[value]] |= taken
        elif name == "ack" and links:
            keys = sorted(sent[links[value % len(links)]])[:2]
            keeper.acknowledge(keys)
            acked.update(keys)
            waiting.difference_update(keys)
        elif name == "wait":
            now += value
        elif name == "hurry":
            assert set(keeper.reassign_late(now)) <= set(links)
        assert keeper.statistics().kept == len(waiting)
    keeper.attach(number := number + 1)
    for link in links:
        keeper.detach(link, {})
    offered: set[int] = set()
    while usages := keeper.pop_due(number, now):
        offered |= {usage.key for usage in usages}
    assert offered == waiting


def test_the_gateway_that_sent_it_hears_it_first() -> None:
    """A usage record is sent on the link on which the request came. If this link ends before it has acknowledged the
    record, the record is sent on a second link and not on any further one."""
    keeper = UsageKeeper()
    keeper.attach(1)
    keeper.attach(2)
    keys = [keeper.keep(ended(), origin=2) for _ in range(4)]
    assert not keeper.has_due(1)
    assert [usage.key for usage in keeper.pop_due(2, 0.0)] == keys
    assert keeper.pop_due(2, 1.0) == []
    keeper.acknowledge(keys[:1])
    keeper.detach(2, {})
    assert [usage.key for usage in keeper.pop_due(1, 2.0)] == keys[1:]
    keeper.attach(3)
    assert keeper.pop_due(3, 3.0) == []


def test_who_never_acknowledges_is_passed_over() -> None:
    """A usage record that is not acknowledged in time is sent on another link."""
    keeper = UsageKeeper(patience_s=60)
    keeper.attach(1)
    key = keeper.keep(ended(), origin=1)
    assert [usage.key for usage in keeper.pop_due(1, 0.0)] == [key]
    assert keeper.reassign_late(100.0) == [], "there is no other link"
    keeper.attach(2)
    assert keeper.reassign_late(59.0) == []
    assert keeper.reassign_late(61.0) == [2]
    assert [usage.key for usage in keeper.pop_due(2, 61.0)] == [key]
    keeper.acknowledge([key])
    assert keeper.statistics().kept == 0


def test_tokens_that_never_left_were_not_delivered() -> None:
    """When a link ends, tokens that were not sent on it are subtracted from `written_tokens` of the requests of that
    link."""
    keeper = UsageKeeper()
    keeper.attach(1)
    keeper.keep(ended(10), origin=1, slot=7)
    keeper.keep(ended(10), origin=1, slot=8)
    keeper.keep(ended(10), origin=2, slot=7)
    keeper.detach(1, {7: 4, 8: 99})
    keeper.attach(3)
    assert [usage.written_tokens for usage in keeper.pop_due(3, 0.0)] == [6, 0, 10]


def test_full_it_drops_the_oldest_and_counts() -> None:
    """When the number of kept records exceeds the limit, the oldest records are dropped and counted."""
    keeper = UsageKeeper(max_records=3)
    keys = [keeper.keep(ended(), origin=0) for _ in range(5)]
    keeper.attach(1)
    assert [usage.key for usage in keeper.pop_due(1, 0.0)] == keys[2:]
    statistics = keeper.statistics()
    assert (statistics.kept, statistics.dropped) == (3, 2)
