"""The choice of a version and of a tokenizer bundle for a call."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from cluster.api.adapters import AdapterSpec, AdapterState, AdapterStatus
from cluster.api.types import CatalogEntry, ModelState, VersionShare
from cluster.gateway.models.directory import ModelDirectory
from tests.gateway.models.test_adapters import A, linked, report
from tests.gateway.models.test_lookup import no_bundle


def directory_of(folder: Path, *shares: VersionShare, retired: tuple[str, ...] = ()) -> ModelDirectory:
    """Return a directory with the model `m`, which has the adapter `a` and these versions."""
    directory = ModelDirectory(folder, no_bundle)
    adapters = (AdapterSpec("a", "/a", A),)
    directory.apply_catalog(
        [CatalogEntry("m", state=ModelState.READY, versions=shares, retired=retired, adapters=adapters)], 1
    )
    return directory


@pytest.mark.parametrize("shares", [(), (VersionShare("v1"),)])
async def test_two_tokenizers_of_a_version_share_its_calls(tmp_path: Path, shares: tuple[VersionShare, ...]) -> None:
    """While workers with another tokenizer replace those of a version, both get calls, by their number of workers. A
    resumed call keeps the tokenizer with which it began."""
    directory = directory_of(tmp_path, *shares)
    linked(directory, "a", "b", "c", version="v1", bundle_digest="old")
    linked(directory, "d", version="v1", bundle_digest="new")
    choose = directory.models[0].versions.choose
    counts = Counter(choose(f"r{number}").bundle_digest for number in range(400))
    assert counts.keys() == {"old", "new"}
    assert 2 < counts["old"] / counts["new"] < 4.5
    assert {choose(f"r{number}", "new").bundle_digest for number in range(20)} == {"new"}


async def test_what_is_replaced_encodes_no_new_call(tmp_path: Path) -> None:
    """Once the old replicas are retired, calls are encoded for the new ones."""
    directory = directory_of(tmp_path, retired=("g1",))
    linked(directory, "a", bundle_digest="old", generation="g1")
    linked(directory, "b", bundle_digest="new", generation="g2")
    choose = directory.models[0].versions.choose
    assert {choose(f"r{number}").bundle_digest for number in range(20)} == {"new"}


async def test_a_version_that_has_the_adapter_is_preferred(tmp_path: Path) -> None:
    """A call for an adapter gets a version on which the adapter is ready. If it is ready on none, the version follows
    from the weights."""
    directory = directory_of(tmp_path, VersionShare("v1", 0.5), VersionShare("v2", 0.5))
    (first,) = linked(directory, "a", version="v1", bundle_digest="b1")
    linked(directory, "b", version="v2", bundle_digest="b2")
    model = directory.models[0]

    def chosen() -> set[str]:
        has_adapter = model.adapters.readiness("a")
        return {model.versions.choose(f"r{number}", has_adapter=has_adapter).first for number in range(20)}

    assert chosen() == {"v1", "v2"}
    report(first, AdapterStatus("a", A, AdapterState.READY))
    assert chosen() == {"v1"}


async def test_the_entry_precedes_the_generation_config(tmp_path: Path) -> None:
    """A model's sampling defaults are those of its catalog entry, else those of its generation config, with and without
    workers, in the stored catalog too."""
    entry = CatalogEntry("m", default_sampling={"top_k": 20, "temperature": 0.6}, sampling={"temperature": 0.2})
    directory = ModelDirectory(tmp_path, no_bundle)
    directory.apply_catalog([entry])
    assert directory.models[0].versions.default_sampling() == {"top_k": 20, "temperature": 0.2}
    linked(directory, "a")
    assert directory.models[0].versions.default_sampling() == {"temperature": 0.2}
    assert ModelDirectory(tmp_path, no_bundle).models[0].entry == entry
