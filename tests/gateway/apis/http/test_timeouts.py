"""Time limits of an HTTP/1 connection, tested with generated timings on a virtual clock."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from cluster.gateway.apis.http.timeouts import HttpTimeouts, Late, TimeoutLimits

LIMITS = TimeoutLimits()


def checked(timeouts: HttpTimeouts, start: float, end: float, unsent_bytes: int = 0) -> tuple[float, Late] | None:
    """Return the time and the reason of the first check in (start, end] that finds the client late; None if no check
    does."""
    now = start + LIMITS.check_s
    while now <= end:
        if (late := timeouts.overdue(now, unsent_bytes)) is not None:
            return now, late
        now += LIMITS.check_s
    return None


@given(gap_s=st.floats(0.1, 30.0))
def test_a_dribbled_head_is_cut_whatever_its_rhythm(gap_s: float) -> None:
    """A connection is closed if the first request head does not end in time, however the bytes of the head arrive."""
    timeouts, now = HttpTimeouts(LIMITS, 0.0), 0.0
    due = LIMITS.check_s
    while now < 60.0:
        now = min(now + gap_s, due)
        if now == due:
            if (late := timeouts.overdue(now)) is not None:
                assert late in (Late.HEAD, Late.IDLE)
                assert now <= LIMITS.first_head_s + 2 * LIMITS.check_s <= 20.0
                return
            due += LIMITS.check_s
        else:
            timeouts.began_head(now)
    raise AssertionError("never cut")


def test_a_connection_without_a_request_is_cut_sooner_than_one_between_requests() -> None:
    """A connection that has sent no request is closed sooner than a connection that is idle between two requests."""
    silent = checked(HttpTimeouts(LIMITS, 0.0), 0.0, 60.0)
    assert silent is not None
    assert silent[0] <= 20.0
    used = HttpTimeouts(LIMITS, 0.0)
    used.began_head(1.0)
    used.ended_head()
    used.ended_body()
    assert checked(used, 1.0, 100.0) is None, "the time of an answer is not limited"
    used.answered(101.0, complete=True)
    between = checked(used, 101.0, 300.0)
    assert between is not None
    assert LIMITS.keep_alive_s < between[0] - 101.0 <= LIMITS.keep_alive_s + LIMITS.check_s
    assert between[1] is Late.IDLE


@given(rates=st.lists(st.integers(0, 3 * LIMITS.min_body_bytes_per_s), min_size=2, max_size=20), data=st.data())
def test_a_body_is_cut_for_a_slow_period_and_never_for_the_gateways_own_pauses(
    rates: list[int], data: st.DataObject
) -> None:
    """A connection is closed after a period in which the body arrived slowly. A period in which the gateway itself did
    not read does not count."""
    timeouts = HttpTimeouts(LIMITS, 0.0)
    timeouts.began_head(0.0)
    timeouts.ended_head()
    now = 0.0
    for index, rate in enumerate(rates):
        paused = data.draw(st.booleans())
        now += LIMITS.check_s
        timeouts.body(int(rate * LIMITS.check_s))
        if paused:
            timeouts.paused()
        slow = rate < LIMITS.min_body_bytes_per_s and not paused and index > 0
        assert timeouts.overdue(now) is (Late.BODY if slow else None)
        if slow:
            return


def test_a_client_that_takes_nothing_is_cut_and_one_that_takes_little_is_not() -> None:
    """The connection of a client that reads no byte of a response is closed. The connection of a client that reads a
    little is kept."""
    timeouts = HttpTimeouts(LIMITS, 0.0)
    timeouts.began_head(0.0)
    timeouts.ended_head()
    timeouts.ended_body()
    now = 0.0
    for unsent in range(100_000, 99_960, -1):
        now += LIMITS.check_s
        assert timeouts.overdue(now, unsent) is None
    found = checked(timeouts, now, now + 100.0, 99_960)
    assert found is not None
    assert found[1] is Late.UNREAD


def test_the_rest_of_a_refused_body_has_seconds() -> None:
    """A connection is closed if the rest of a refused body does not arrive within a few seconds."""
    timeouts = HttpTimeouts(LIMITS, 0.0)
    timeouts.began_head(0.0)
    timeouts.ended_head()
    timeouts.answered(1.0, complete=False)
    timeouts.body(10**9)
    found = checked(timeouts, 1.0, 60.0)
    assert found is not None
    assert found[1] is Late.LEFTOVER
    timeouts.answered(8.0, complete=True)
    assert checked(timeouts, 8.0, 60.0) is None
