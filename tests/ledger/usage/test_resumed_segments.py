"""A resume of a broken stream is claimed once, by one atomic write to the database."""

from __future__ import annotations

from collections import Counter
from concurrent.futures import ThreadPoolExecutor

from cluster.ledger.store import Ledger


def test_of_many_one_is_the_first(ledger: Ledger) -> None:
    """Of sixteen concurrent claims of a name, one succeeds. After its expiry, the name can be claimed again."""
    names = [f"call.{i}" for i in range(8)]

    def claim(segments: list[str], now_s: float) -> list[bool]:
        return list(ledger.resumed_segments.claim([(name, now_s + 100.0) for name in segments], now_s))

    orders = [names, names[::-1], names[4:] + names[:4], [*names, *names]]
    with ThreadPoolExecutor(16) as threads:
        claims = list(threads.map(lambda i: (orders[i % 4], claim(orders[i % 4], 100.0)), range(16)))
    firsts = Counter(name for order, won in claims for name, first in zip(order, won, strict=True) if first)
    assert firsts == dict.fromkeys(names, 1)
    assert not any(claim(names, 199.0))
    assert claim([names[0], "new", names[0]], 201.0) == [True, True, False]
    assert ledger.resumed_segments.expire(250.0) == 7
    assert claim(names[:2], 250.0) == [False, True]
