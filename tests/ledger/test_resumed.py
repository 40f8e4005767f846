"""Who resumes what is decided once, by one atomic write."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

from cluster.ledger.store import Ledger


def test_of_many_one_is_the_first(ledger: Ledger) -> None:
    """Sixteen at a time over one database: each name is taken by one of them, and stays taken until it expires."""
    names = [f"call.{i}" for i in range(8)]
    with ThreadPoolExecutor(16) as threads:
        for name in names:
            took = list(threads.map(lambda _, name=name: ledger.resumed.take(name, 100.0, 200.0), range(16)))
            assert sum(took) == 1
    assert not any(ledger.resumed.take(name, 199.0, 300.0) for name in names)
    assert ledger.resumed.take(names[0], 201.0, 300.0)
    assert ledger.resumed.expire(250.0) == 7
    assert not ledger.resumed.take(names[0], 250.0, 400.0)
