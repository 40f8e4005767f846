"""Large requests are read in turns: in order, a few in a pass, and what one meets stops no other."""

from __future__ import annotations

import asyncio

from hypothesis import given
from hypothesis import strategies as st

from cluster.rpc.read_turns import PASS_S, ReadTurns

COSTS = st.lists(st.tuples(st.integers(0, 3), st.floats(0.0, 2 * PASS_S)), min_size=1, max_size=40)


class Costly:
    """Readers whose every piece takes a while of a clock that only they move."""

    def __init__(self) -> None:
        self.now = 0.0
        self.taken: list[tuple[int, bytes]] = []

    def reader(self, name: int, cost_s: float, *, broken: bool = False) -> Reading:
        return Reading(self, name, cost_s, broken)


class Reading:
    """One of them."""

    def __init__(self, all_of_them: Costly, name: int, cost_s: float, broken: bool) -> None:
        self._all, self._name, self._cost_s, self._broken = all_of_them, name, cost_s, broken

    def take(self, data: bytes) -> None:
        self._all.now += self._cost_s
        self._all.taken.append((self._name, data))
        if self._broken:
            raise RuntimeError("broken")


@given(COSTS)
def test_all_is_taken_in_order_and_no_pass_is_long(pieces: list[tuple[int, float]]) -> None:
    """A pass is over its time by the last piece that it began, and by no more."""

    async def play() -> None:
        costly = Costly()
        turns = ReadTurns(lambda: costly.now)
        for number, (name, cost_s) in enumerate(pieces):
            turns.put(costly.reader(name, cost_s), b"%d" % number)
        before = 0.0
        while len(costly.taken) < len(pieces):
            count = len(costly.taken)
            await asyncio.sleep(0)
            begun = costly.taken[count:]
            assert begun, "a pass took nothing"
            last_s = pieces[count + len(begun) - 1][1]
            assert costly.now - before - last_s < PASS_S
            before = costly.now
        assert costly.taken == [(name, b"%d" % number) for number, (name, _) in enumerate(pieces)]

    asyncio.run(play())


async def test_what_one_meets_stops_no_other() -> None:
    """A reader that raises loses its own turn; the loop is told."""
    told: list[dict[str, object]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: told.append(context))
    costly = Costly()
    turns = ReadTurns()
    turns.put(costly.reader(0, 0.0, broken=True), b"a")
    turns.put(costly.reader(1, 0.0), b"b")
    for _ in range(4):
        await asyncio.sleep(0)
    assert costly.taken == [(0, b"a"), (1, b"b")]
    assert [str(context["exception"]) for context in told] == ["broken"]
