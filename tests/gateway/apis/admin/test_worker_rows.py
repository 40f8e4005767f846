"""Rows of workers in the admin API."""

from __future__ import annotations

from pathlib import Path

from cluster.api.types import MAX_INT32, EngineLoad
from cluster.gateway.apis.admin.fleet import _worker
from tests.gateway.models.test_adapters import directory_with, linked


async def test_a_huge_load_is_shown_as_the_largest_number(tmp_path: Path) -> None:
    """A worker may report more requests than an int32 holds. Its row then has the largest int32, so that the list of
    workers can be read."""
    (link,) = linked(directory_with(tmp_path), "w")
    link.load = EngineLoad(running=2**32 - 1, waiting=2**32 - 1)
    link._credit.apply_credit(1, 2**40, 2**40)
    row = _worker(link)
    assert (row.running, row.waiting, row.free_sequences) == (MAX_INT32, MAX_INT32, MAX_INT32)
