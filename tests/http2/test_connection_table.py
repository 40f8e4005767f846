"""Property tests of the connection table, over random sequences of arrivals, authentications, calls and ends."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import count

from hypothesis import given
from hypothesis import strategies as st

from cluster.http2.connection_table import (
    BURST_PART,
    MEAN_LIFETIME_S,
    MIN_CONNECTIONS,
    OWN_DESCRIPTORS,
    SHARES,
    UNREAD_PASSES,
    ConnectionSlot,
    ConnectionStage,
    ConnectionTable,
    Pool,
    Port,
    peer_of,
)

ADDRESSES = [f"10.0.0.{i}" for i in range(5)]
EVENTS = st.lists(
    st.tuples(st.sampled_from(["arrive", "arrive", "arrive", "prove", "call", "rest", "end"]), st.integers(0, 10**6)),
    max_size=200,
)


NOW = count(step=10)


@dataclass
class Fake:
    """A fake connection for the connection table."""

    stage: ConnectionStage = ConnectionStage.GREETED
    requests: int = 0

    def evict(self) -> None:
        """Do nothing, since a fake connection has nothing to close."""


def connection_of(held: ConnectionSlot) -> Fake:
    """Return the fake connection in a slot."""
    assert isinstance(held.connection, Fake)
    return held.connection


def arrive(pool: Pool, address: str) -> tuple[ConnectionSlot | None, ConnectionSlot | None]:
    """Admit a new connection to the pool. Return its slot, and the slot of the connection that was closed for it."""
    pool.passes += UNREAD_PASSES + 1
    held, victim = pool.admit(address, next(NOW))
    if held is not None:
        held.connection = Fake()
    return held, victim


def calls(held: ConnectionSlot) -> None:
    """Authenticate a connection and begin a call on it."""
    held.mark_authenticated()
    connection_of(held).stage = ConnectionStage.CALLING


@given(cap=st.integers(1, 40), events=EVENTS)
def test_caps_hold_and_a_proven_call_keeps_its_place(cap: int, events: list[tuple[str, int]]) -> None:
    """A pool never exceeds its caps, and never closes an authenticated connection that has a call."""
    pool, kept = Pool(cap), list[ConnectionSlot]()
    for kind, number in events:
        if kind == "arrive":
            held, victim = arrive(pool, ADDRESSES[number % len(ADDRESSES)])
            if victim is not None:
                kept.remove(victim)
                assert not (victim.authenticated and connection_of(victim).stage is ConnectionStage.CALLING)
            if held is None:
                assert victim is None
            else:
                kept.append(held)
        elif kept:
            slot = kept[number % len(kept)]
            if kind == "prove":
                slot.mark_authenticated()
            elif kind == "end":
                slot.release()
                kept.remove(slot)
            else:
                connection_of(slot).stage = ConnectionStage.CALLING if kind == "call" else ConnectionStage.GREETED
                connection_of(slot).requests += kind == "call"
        assert len(pool) == len(kept) <= cap
        assert all(sum(h.peer == a for h in kept) <= pool.peer_cap for a in ADDRESSES)
    for slot in kept:
        slot.release()
        slot.release()
    assert repr(pool) == f"<Pool 0 of {cap}, 0 unauthenticated, 0 addresses>"


@given(cap=st.integers(MIN_CONNECTIONS, 100), flood=st.integers(1, 300))
def test_a_tenant_gets_in_and_stays_whatever_strangers_of_another_address_do(cap: int, flood: int) -> None:
    """A client of a tenant can connect, and its connection is not closed, although hundreds of idle connections come
    from another address."""
    pool = Pool(cap)
    for _ in range(flood):
        arrive(pool, "10.0.0.1")
    tenant, _ = arrive(pool, "10.0.0.2")
    assert tenant is not None
    for _ in range(flood):
        _, victim = arrive(pool, "10.0.0.1")
        assert victim is not tenant, "the address with the most unauthenticated connections loses one"
    tenant.mark_authenticated()
    for i in range(flood):
        _, victim = arrive(pool, f"10.0.1.{i % 250}")
        assert victim is not tenant


@given(cap=st.integers(4 * MIN_CONNECTIONS, 100))
def test_a_tenant_behind_the_strangers_own_address_gets_in(cap: int) -> None:
    """A tenant connects and stays connected even if its address also has unauthenticated connections, as behind an
    ingress."""
    pool = Pool(cap)
    for _ in range(300):
        arrive(pool, "10.0.0.1")
    tenant, _ = arrive(pool, "10.0.0.1")
    assert tenant is not None
    for _ in range(pool.peer_cap - 1):
        assert arrive(pool, "10.0.0.1")[1] is not tenant, "the oldest goes first"
    tenant.mark_authenticated()
    for _ in range(300):
        assert arrive(pool, "10.0.0.1")[1] is not tenant


@given(cap=st.integers(MIN_CONNECTIONS, 100))
def test_a_port_full_of_resting_tenants_leaves_newcomers_time_to_prove_themselves(cap: int) -> None:
    """At a port full of authenticated connections, an idle one is closed for a new connection. Despite a flood, the new
    connection has time to authenticate."""
    pool = Pool(cap)
    resting = [arrive(pool, f"10.0.{i}.1")[0] for i in range(cap)]
    for held in resting:
        assert held is not None
        held.mark_authenticated()
    newcomer, victim = arrive(pool, "10.1.0.1")
    assert newcomer is not None
    assert victim is not None
    assert victim.authenticated
    for i in range(cap // 8 - 1):
        assert arrive(pool, f"10.1.{i}.2")[1] is not newcomer


def test_a_port_full_of_calls_refuses() -> None:
    """A port whose connections all have calls refuses a new connection and ends no call."""
    pool = Pool(16)
    for i in range(16):
        held, _ = arrive(pool, f"10.0.{i}.1")
        assert held is not None
        calls(held)
    assert pool.admit("10.1.0.1", next(NOW)) == (None, None)


def test_a_connection_that_was_used_outlasts_one_that_was_not() -> None:
    """When the connection table is full, it closes a connection that has had no call since the last check. It keeps
    connections that had a call."""
    pool = Pool(16)
    held = [h for i in range(16) if (h := arrive(pool, f"10.0.{i}.1")[0]) is not None]
    for slot in held:
        slot.mark_authenticated()
        slot.used()
    for slot in held[:10]:
        connection_of(slot).requests += 1
    _, victim = arrive(pool, "10.1.0.1")
    assert victim is held[10]


@given(limit=st.integers(0, 1 << 20))
def test_shares_of_all_ports_fit_the_descriptors(limit: int) -> None:
    """The caps of all ports together fit the descriptor limit."""
    table = ConnectionTable.for_descriptors(limit)
    assert set(table.pools) == set(Port) == set(SHARES)
    assert min(pool.cap for pool in table.pools.values()) >= MIN_CONNECTIONS
    if limit >= 256:
        assert sum(pool.cap for pool in table.pools.values()) <= limit - OWN_DESCRIPTORS + 2 * MIN_CONNECTIONS


@given(stages=st.lists(st.sampled_from(ConnectionStage), min_size=16, max_size=16))
def test_of_one_address_the_oldest_of_the_least_far_goes(stages: list[ConnectionStage]) -> None:
    """If all connections come from one address, the oldest of those at the earliest stage is closed first."""
    pool = Pool(16)
    pool.peer_cap = 16
    held = [h for _ in stages if (h := arrive(pool, "10.0.0.1")[0]) is not None]
    for slot, stage in zip(held, stages, strict=True):
        connection_of(slot).stage = stage
    _, victim = arrive(pool, "10.0.0.1")
    assert victim is held[stages.index(min(stages))]


def test_a_connection_that_is_not_read_yet_has_not_been_silent() -> None:
    """A new connection does not count as silent while the bytes of its client may still be unread."""
    pool = Pool(16)
    pool.peer_cap = 16
    held = [h for _ in range(16) if (h := pool.admit("10.0.0.1", 1.0)[0]) is not None]
    for slot in held:
        slot.connection = Fake(ConnectionStage.GREETED)
    newcomer, victim = pool.admit("10.0.0.1", 2.0)
    assert victim is held[0]
    _, victim = pool.admit("10.0.0.1", 2.01)
    assert victim is held[1]
    _, victim = pool.admit("10.0.0.1", 9.0)
    assert victim is held[2], "the process was stalled: no connection was read meanwhile"
    pool.passes += UNREAD_PASSES + 1
    _, victim = pool.admit("10.0.0.1", 9.01)
    assert victim is newcomer


@given(cap=st.integers(MIN_CONNECTIONS, 100), every_s=st.floats(1e-5, 0.1))
def test_a_full_port_changes_hands_no_faster_than_its_size_allows(cap: int, every_s: float) -> None:
    """On a full port, new connections replace old ones only at a limited rate. So a slow client has time to
    authenticate before its connection is replaced."""
    pool, now, victims = Pool(cap), 0.0, 0
    for i in range(3 * cap):
        now += every_s
        if pool.wait_s(now) == 0.0:
            victims += pool.admit(f"10.{i >> 8}.{i & 255}.1", now)[1] is not None
    assert victims <= cap / BURST_PART + 1 + now * cap / MEAN_LIFETIME_S


def test_an_ipv6_subscriber_is_one_peer() -> None:
    """All addresses of one IPv6 /64 prefix count as one address."""
    assert peer_of("2001:db8::1") == peer_of("2001:db8::ffff:2") != peer_of("2001:db8:0:1::1")
    assert peer_of("::ffff:10.0.0.1") == peer_of("10.0.0.1")
    assert peer_of("fe80::1%eth0") == peer_of("fe80::2%eth0")
