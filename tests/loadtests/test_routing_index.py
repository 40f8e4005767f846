"""The part `index` of the load test `routing`, with few pairs of block and worker."""

from __future__ import annotations

from pathlib import Path

import pytest

from loadtests.routing import index


@pytest.fixture(scope="module")
def rows() -> dict[str, float]:
    """Return the values of a small run, by name of the row."""
    figures = [*index.run(workers=600, pairs=600 * 500, calls=40), *index.run_peers(Path("/nowhere"), pairs=10_000)]
    assert [figure.name for figure in figures] == list(index.ROWS)
    return {figure.name: figure.value for figure in figures if figure.value is not None}


@pytest.mark.slow
def test_every_row_has_a_value_but_those_of_absent_peers(rows: dict[str, float]) -> None:
    assert set(index.ROWS) - set(rows) == set(index.PEERS["dynamo"])
    assert all(value > 0 for value in rows.values())


def test_counted_rows_meet_their_bounds(rows: dict[str, float]) -> None:
    """The rows that do not depend on the machine's speed meet their bounds in a small run, too."""
    assert rows[index.GROWN] <= 1.02
    assert rows[index.BYTES] <= 40
