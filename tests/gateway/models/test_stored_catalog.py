"""The stored catalog, which survives a restart of the gateway."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster.api.types import CatalogEntry, ModelState, VersionShare
from cluster.gateway.models.directory import ModelDirectory
from cluster.gateway.models.stored_catalog import StoredCatalog
from cluster.gateway.scheduling.queue_errors import not_servable
from cluster.wire.bundle import Bundle


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


def test_a_stored_failure_is_not_restored(tmp_path: Path) -> None:
    """After a restart, a gateway refuses no call because of a failure in its stored catalog, until a controller reports
    the failure again."""

    async def fetch(digest: str) -> Bundle:
        raise LookupError(digest)

    broken = VersionShare("v2", 0.1, state=ModelState.FAILED, state_reason="no such folder", replicas=1)
    failed = CatalogEntry("m", state=ModelState.FAILED, state_reason="no such folder", replicas=2, versions=(broken,))
    ModelDirectory(tmp_path, fetch).apply_catalog([failed])
    restarted = ModelDirectory(tmp_path, fetch)
    (model,) = restarted.models
    assert (model.state, model.entry.state_reason, model.entry.replicas) == (ModelState.DECLARED, "", 0)
    assert model.entry.versions == (VersionShare("v2", 0.1),)
    assert not_servable(model) is None
    restarted.apply_catalog([failed])
    refused = not_servable(restarted.models[0])
    assert refused is not None
    assert "no such folder" in refused.message
