"""The stored catalog, which survives a restart of the gateway."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster.api.types import CatalogEntry, ModelState
from cluster.gateway.models.stored_catalog import StoredCatalog


def test_the_last_catalog_is_read(tmp_path: Path) -> None:
    """The catalog that was saved last is loaded with its revision."""
    stored = StoredCatalog(tmp_path / "gateway")
    assert stored.load() == (0, ())
    stored.save([CatalogEntry("a")], 1)
    entries = [CatalogEntry("b", ("alias",), state=ModelState.READY), CatalogEntry("c")]
    stored.save(entries, 2)
    assert StoredCatalog(tmp_path / "gateway").load() == (2, entries)


@pytest.mark.parametrize("content", ["", "[1]", "{}", '{"revision": 1, "models": ["zz"]}', '{"revision": 1}'])
def test_a_damaged_file_counts_as_no_catalog(tmp_path: Path, content: str) -> None:
    """A catalog file that cannot be parsed is ignored."""
    (tmp_path / "catalog.json").write_text(content)
    assert StoredCatalog(tmp_path).load() == (0, ())
