"""Connections take turns to parse large requests: in order, and a few per event-loop pass. An error of one connection
does not stop the others."""

from __future__ import annotations

import asyncio
from collections import deque
from itertools import groupby

from hypothesis import given
from hypothesis import strategies as st

from cluster.http2.read_slices import PASS_S, SLICE_S, WINDOW_S, ReadTurns

COSTS = st.lists(st.lists(st.floats(0.0, 2 * SLICE_S), min_size=1, max_size=12), min_size=1, max_size=12)


class Costly:
    """A fake clock that several readers share. Each parsed frame advances the clock by the cost of the frame. `taken`:
    the reader of each parsed frame, in order."""

    def __init__(self) -> None:
        self.now = 0.0
        self.taken: list[int] = []


class Reading:
    """A fake reader of a connection. Each frame has a parsing cost. Parsing a frame advances the fake clock, which
    several readers share, by this cost."""

    def __init__(self, all_of_them: Costly, name: int, costs_s: list[float], *, broken: bool = False) -> None:
        self._all, self._name, self._broken = all_of_them, name, broken
        self._left = deque(costs_s)

    def parse(self, until: float) -> bool:
        while self._left:
            self._all.now += self._left.popleft()
            self._all.taken.append(self._name)
            if self._broken:
                raise RuntimeError("broken")
            if self._all.now >= until:
                break
        return bool(self._left)


@given(COSTS)
def test_no_pass_is_long_and_no_reader_waits_for_all_of_another(readers: list[list[float]]) -> None:
    """Readers of several connections take turns, each with a short slice of parsing time. Every reader gets its first
    slice before any reader gets a second one. An event-loop pass exceeds PASS_S by at most three slices."""

    async def play() -> None:
        costly = Costly()
        turns = ReadTurns(lambda: costly.now)
        for name, costs_s in enumerate(readers):
            turns.put(Reading(costly, name, costs_s))
        frames, before = sum(map(len, readers)), 0.0
        while len(costly.taken) < frames:
            count = len(costly.taken)
            await asyncio.sleep(0)
            assert len(costly.taken) > count, "a pass took nothing"
            assert costly.now - before <= PASS_S + 3 * SLICE_S + 1e-9
            before = costly.now
        slices = [name for name, _ in groupby(costly.taken)]
        assert slices[: len(readers)] == list(range(len(readers)))
        assert sorted(costly.taken) == [name for name, costs_s in enumerate(readers) for _ in costs_s]

    asyncio.run(play())


def test_reads_at_once_take_their_share_and_no_more() -> None:
    """Short reads are parsed at once, until recent reads have used up the parse time of one event-loop pass. After
    that, reads are deferred."""
    costly = Costly()
    turns = ReadTurns(lambda: costly.now)
    reads = [Reading(costly, name, [PASS_S / 4]) for name in range(6)]
    assert [turns.parse_now(reader) for reader in reads] == [False] * 4 + [True] * 2
    costly.now += WINDOW_S
    assert not turns.parse_now(reads[4])
    assert costly.taken == [0, 1, 2, 3, 4]


async def test_what_one_meets_stops_no_other() -> None:
    """If a reader raises an error, the other readers continue, and the event loop's exception handler gets the
    error."""
    contexts: list[dict[str, object]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: contexts.append(context))
    costly = Costly()
    turns = ReadTurns()
    turns.put(Reading(costly, 0, [0.0], broken=True))
    turns.put(Reading(costly, 1, [0.0]))
    for _ in range(4):
        await asyncio.sleep(0)
    assert costly.taken == [0, 1]
    assert [str(context["exception"]) for context in contexts] == ["broken"]
