"""Adapters that are loaded at run time: they are stored beside the catalog and published, and no replica restarts."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from cluster.admin.v1 import adapters_pb2 as pb
from cluster.api.outcomes import Outcome
from cluster.controller import links
from tests.controller.test_catalog_service import FILE, CatalogBed, refused

ENTRY: dict[str, Any] = {"name": "l", "source": "/l", "aliases": ["x"], "adapters": {"own": "/own"}}


async def bed_with_lora(folder: Path, **options: Any) -> CatalogBed:
    """Return a CatalogBed with one model, `l`. LoRA is on for the model, and its catalog entry has an adapter `own`."""
    bed = CatalogBed(folder, **options)
    await bed.up()
    await bed.apply(ENTRY)
    await bed.up()
    return bed


async def load(bed: CatalogBed, name: str = "l", adapter: str = "a", **fields: Any) -> pb.Adapter:
    """Send a LoadAdapter request as the admin API does."""
    request = pb.LoadAdapterRequest(name=name, adapter=adapter, **{"source": "/a", **fields})
    answer = await bed.verbs["Catalog.LoadAdapter"](request.SerializeToString(), "key:k1")
    return pb.LoadAdapterResponse.FromString(answer).adapter


async def unload(bed: CatalogBed, adapter: str, name: str = "l") -> pb.Adapter:
    """Send an UnloadAdapter request."""
    request = pb.UnloadAdapterRequest(name=name, adapter=adapter)
    answer = await bed.verbs["Catalog.UnloadAdapter"](request.SerializeToString(), "key:k1")
    return pb.UnloadAdapterResponse.FromString(answer).adapter


async def published(bed: CatalogBed, model: str = "l") -> Sequence[tuple[str, str]]:
    """Let the controller make one pass, and return the name and source of each adapter of a model, as published to the
    gateways."""
    await bed.controller.step()
    return [(adapter.name, adapter.source) for adapter in bed.gateways.published[model].adapters]


async def test_a_loaded_adapter_is_published_and_replaces_no_replica(tmp_path: Path) -> None:
    """An adapter is loaded with the model's alias, then loaded from another source, then unloaded. No replica
    restarts."""
    bed = await bed_with_lora(tmp_path)
    adapter = await load(bed, "x", tenants=["acme"], pinned=True)
    assert (adapter.model, adapter.name, list(adapter.tenants), adapter.pinned) == ("l", "a", ["acme"], True)
    assert await published(bed) == [("own", "/own"), ("a", "/a")]
    await load(bed, source="/b")
    assert await published(bed) == [("own", "/own"), ("a", "/b")]
    assert (await unload(bed, "a")).source == "/b"
    assert await published(bed) == [("own", "/own")]
    assert bed.ray.journal == []


async def test_a_loaded_adapter_survives_apply_and_a_restart(tmp_path: Path) -> None:
    """An adapter that was loaded at run time survives a changed entry of its model and a restart of the
    controller. If the entry has an adapter of the same name, the entry's adapter takes precedence.

    The loaded adapter is dropped when its model is removed, and at the next start of a local cluster.
    """
    bed = await bed_with_lora(tmp_path)
    await load(bed)
    await bed.apply({**ENTRY, "adapters": {"other": "/other"}})
    assert await published(bed) == [("other", "/other"), ("a", "/a")]
    later = CatalogBed(tmp_path, ray=bed.ray)
    assert await published(later) == [("other", "/other"), ("a", "/a")]
    await later.apply({**ENTRY, "adapters": {"a": "/entry"}})
    assert await published(later) == [("a", "/entry")]
    await later.apply({**ENTRY, "adapters": {"own": "/own"}})
    assert await published(later) == [("own", "/own"), ("a", "/a")]
    assert "a" not in [adapter.name for adapter in (await reborn(tmp_path)).catalog.config.models[0].adapters or ()]
    await later.apply({"name": "m", "source": "/m"}, prune=True)
    await later.apply({"name": "m", "source": "/m"}, ENTRY)
    assert await published(later) == [("own", "/own")]


async def reborn(folder: Path) -> CatalogBed:
    """Return the catalog after the next start of a local cluster."""
    return CatalogBed(folder, life="two")


async def test_adapters_of_the_files_models_can_be_loaded(tmp_path: Path) -> None:
    """Adapters can be loaded for models that only the configuration file may change. They are published beside the
    file's adapters."""
    text = FILE.replace("{name: n, source: /n}", "{name: n, source: /n, adapters: {own: /own}}")
    bed = CatalogBed(tmp_path, by_file=True, text=text)
    await bed.up()
    await load(bed, "n")
    assert (await refused(load(bed, "n", "own"))).outcome is Outcome.MANAGED_BY_FILE
    later = CatalogBed(tmp_path, by_file=True, text=text.replace("/own", "/new"), ray=bed.ray)
    assert await published(later, "n") == [("own", "/new"), ("a", "/a")]
    without = CatalogBed(tmp_path, by_file=True, ray=bed.ray)
    assert await published(without, "n") == [], "the file has switched LoRA off"
    assert bed.ray.journal == ["deploy n"], "which replaces the replicas"


@pytest.mark.parametrize(
    ("fields", "outcome", "field"),
    [
        ({"name": "none"}, Outcome.MODEL_NOT_FOUND, ""),
        ({"name": "n"}, Outcome.INVALID_FIELD, "name"),
        ({"adapter": "own"}, Outcome.MANAGED_BY_FILE, ""),
        ({"adapter": "a:b"}, Outcome.INVALID_FIELD, "adapter"),
        ({"source": ""}, Outcome.INVALID_FIELD, "source"),
        ({"source": "ftp://x"}, Outcome.INVALID_FIELD, "source"),
        ({"digest": "abc"}, Outcome.INVALID_FIELD, "digest"),
        ({"version": "v9"}, Outcome.INVALID_FIELD, "version"),
    ],
)
async def test_a_wrong_adapter_changes_nothing(
    tmp_path: Path, fields: dict[str, Any], outcome: Outcome, field: str
) -> None:
    """A request to load a wrong adapter is refused. If a field of the request is wrong, the error names the field."""
    bed = await bed_with_lora(tmp_path)
    error = await refused(load(bed, **fields))
    assert error.outcome is outcome
    assert [violation.field for violation in error.violations] == ([field] if field else [])
    assert await published(bed) == [("own", "/own")]


async def test_only_what_was_loaded_is_unloaded(tmp_path: Path) -> None:
    """Unloading is refused for an adapter that belongs to the model's catalog entry, and for an unknown adapter."""
    bed = await bed_with_lora(tmp_path)
    assert (await refused(unload(bed, "own"))).outcome is Outcome.MANAGED_BY_FILE
    assert (await refused(unload(bed, "none"))).outcome is Outcome.NOT_FOUND


def test_the_revision_grows_over_a_restart() -> None:
    """A controller that starts later publishes a higher revision, since workers use the set with the highest
    revision."""
    revisions = []
    for start_s in (1000.0, 1000.5):
        controller = links.ControllerLinks(
            controller_id="c", gateways=(), tls=None, bundles=lambda digest: None, wall_s=partial(float, start_s)
        )
        controller.publish([])
        controller.publish([])
        revisions.append(controller._revision)
    assert revisions[0] < revisions[1]
