"""Adapters that are loaded at run time: they are stored beside the catalog and published, and no replica restarts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from cluster.admin.v1 import adapters_pb2 as pb
from cluster.api.outcomes import Outcome
from cluster.config.document import parse
from cluster.controller import links
from cluster.controller.catalog_overlay import CatalogOverlayFile
from cluster.controller.desired_models import DesiredModels
from cluster.controller.editable_catalog import EditableCatalog
from cluster.controller.replica_settings import settings_of
from cluster.wire.codecs.adapter_codec import adapter_to_pb, adapters_from_pb
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


async def test_each_load_has_a_higher_number(tmp_path: Path) -> None:
    """Each load of an adapter has a higher number than the one before, also after a restart of the controller. Adapters
    of the entry have none. The stored adapters have only keys that older releases know."""
    bed = await bed_with_lora(tmp_path)
    first, second = await load(bed), await load(bed)
    later = CatalogBed(tmp_path, ray=bed.ray)
    await later.controller.step()
    numbers = {adapter.name: adapter.load_number for adapter in later.gateways.published["l"].adapters}
    assert numbers == {"own": 0, "a": second.load_number}
    third = await load(later)
    assert 0 < first.load_number < second.load_number < third.load_number
    (stored,) = json.loads((tmp_path / "catalog.json").read_text())["adapters"]["l"]
    assert sorted(stored) == ["digest", "license", "name", "pinned", "source", "tenants", "version"]


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


N_IN_FILE = "  - {name: n, source: /n}\n"
WITH_LORA = FILE.replace(N_IN_FILE, "  - {name: n, source: /n, adapters: []}\n")
WITHOUT_N = FILE.replace(N_IN_FILE, "")


async def test_loaded_adapters_are_dropped_when_their_model_leaves_the_file(tmp_path: Path) -> None:
    """A controller that starts with a file without a model drops the adapters that were loaded for this model. A later
    model of the same name does not get them. Adapters of a model that operators have applied stay."""
    bed = CatalogBed(tmp_path, by_file=True, text=WITH_LORA)
    await bed.apply({"name": "o", "source": "/o", "adapters": []})
    for name in ("n", "o"):
        await load(bed, name)
    with capture_logs() as logs:
        CatalogBed(tmp_path, by_file=True, text=WITHOUT_N)
    assert [(line["model"], line["adapters"]) for line in logs if line["event"] == "adapter.model_removed"] == [
        ("n", ["a"])
    ]
    later = CatalogBed(tmp_path, by_file=True, text=WITH_LORA.replace("source: /n", "source: /other"))
    assert await published(later, "n") == []
    assert await published(later, "o") == [("a", "/a")]


@pytest.mark.parametrize(
    ("text", "is_whole"),
    [(WITHOUT_N, False), (WITHOUT_N.replace("aliases: [default]", "aliases: [o]"), True)],
    ids=["a part of the file is invalid", "the stored models are invalid beside the file"],
)
async def test_an_invalid_catalog_drops_no_loaded_adapter(tmp_path: Path, text: str, is_whole: bool) -> None:
    """A controller that starts with a partly invalid file keeps all adapters that were loaded at run time, since the
    invalid part may have their models. So does one that cannot use the stored models. A later apply keeps them too."""
    bed = CatalogBed(tmp_path, by_file=True, text=WITH_LORA)
    await bed.apply({"name": "o", "source": "/o", "adapters": []})
    await load(bed, "n")
    partly = CatalogBed(tmp_path, by_file=True, text=text, is_whole=is_whole)
    await partly.apply({"name": "p", "source": "/p"})
    assert await published(CatalogBed(tmp_path, by_file=True, text=WITH_LORA), "n") == [("a", "/a")]


async def test_a_catalog_that_cannot_be_stored_starts_without_the_dropped_adapters(tmp_path: Path) -> None:
    """A controller starts even if it cannot store the catalog without the adapters of a removed model."""
    await load(CatalogBed(tmp_path, by_file=True, text=WITH_LORA), "n")

    def fail() -> None:
        raise OSError("no space left")

    with capture_logs() as logs:
        later = EditableCatalog(
            parse(WITHOUT_N),
            DesiredModels(),
            CatalogOverlayFile(tmp_path / "catalog.json", "one", fail),
            lambda config: settings_of(config, gateways=["g:1"], local=True),
            by_file=True,
        )
    assert [model.name for model in later.config.models] == ["m"]
    assert [line["reason"] for line in logs if line["event"] == "catalog.copy_not_written"] == ["no space left"]


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


async def test_a_loaded_adapter_behind_a_declared_one_is_unloaded(tmp_path: Path) -> None:
    """If the entry now declares an adapter with the name of a loaded one, an unload removes the loaded one. A second
    unload is refused, and the declared adapter stays until the entry changes."""
    bed = await bed_with_lora(tmp_path)
    await load(bed)
    await bed.apply({**ENTRY, "adapters": {"a": "/entry"}})
    assert (await unload(bed, "a")).source == "/a"
    assert (await refused(unload(bed, "a"))).outcome is Outcome.MANAGED_BY_FILE
    assert await published(bed) == [("a", "/entry")]
    await bed.apply(ENTRY)
    assert await published(bed) == [("own", "/own")]


def many(count: int, tenants: int = 0) -> list[dict[str, Any]]:
    """Return `count` adapters of an entry, each with `tenants` tenants."""
    names = [f"t{number}" for number in range(tenants)]
    return [{"name": f"e{number}", "source": "/e", "tenants": names} for number in range(count)]


@pytest.mark.parametrize(
    ("adapters", "told"),
    [
        (many(1000, 4), "unload 3 of the loaded adapters first (a, b, c)"),
        (many(1000), "unload 3 of the loaded adapters first (a, b, c)"),
        (many(800, 4), "unload 1 of the loaded adapters first (c)"),
    ],
)
async def test_an_entry_with_too_many_adapters_beside_the_loaded_ones_is_refused(
    tmp_path: Path, adapters: list[dict[str, Any]], told: str
) -> None:
    """Apply and its preview refuse an entry that exceeds the limits of a model together with the loaded adapters, and
    accept the entry after so many loaded adapters are unloaded."""
    bed = await bed_with_lora(tmp_path)
    for name in "abc":
        await load(bed, adapter=name, tenants=[f"t{number}" for number in range(300)])
    for options in ({"validate_only": True}, {}):
        error = await refused(bed.apply({**ENTRY, "adapters": adapters}, **options))
        assert error.outcome is Outcome.INVALID_FIELD
        assert [(one.field, told in one.description) for one in error.violations] == [("models[l].adapters", True)]
    assert [name for name, _ in await published(bed)] == ["own", "a", "b", "c"]
    for name in told.rpartition("(")[2].rstrip(")").split(", "):
        await unload(bed, name)
    await bed.apply({**ENTRY, "adapters": adapters})
    assert [name for name, _ in (await published(bed))[: len(adapters)]] == [one["name"] for one in adapters]


async def test_surplus_loaded_adapters_are_left_out_after_a_change_of_the_file(tmp_path: Path) -> None:
    """If a new configuration file leaves no room for all loaded adapters, the surplus is logged and not published, and
    blocks no change of another model. The surplus is published again when there is room."""
    text = FILE.replace("{name: n, source: /n}", "{name: n, source: /n, adapters: ADAPTERS}")
    bed = CatalogBed(tmp_path, by_file=True, text=text.replace("ADAPTERS", "[]"))
    for name, tenants in (("a", 300), ("b", 900), ("c", 5)):
        await load(bed, "n", name, tenants=[f"t{number}" for number in range(tenants)])
    with capture_logs() as logs:
        later = CatalogBed(tmp_path, by_file=True, text=text.replace("ADAPTERS", str(many(900, 4))), ray=bed.ray)
        await later.apply({"name": "o", "source": "/o"})
    left_out = [line for line in logs if line["event"] == "adapter.left_out"]
    assert left_out == [{"event": "adapter.left_out", "log_level": "warning", "model": "n", "adapters": ["b"]}]
    assert [name for name, _ in await published(later, "n")][900:] == ["a", "c"]
    assert adapters_from_pb([adapter_to_pb(one) for one in later.gateways.published["n"].adapters])
    again = CatalogBed(tmp_path, by_file=True, text=text.replace("ADAPTERS", "[]"), ray=bed.ray)
    assert [name for name, _ in await published(again, "n")] == ["a", "b", "c"]


async def test_a_load_is_refused_beyond_the_limits_of_all_adapters(tmp_path: Path) -> None:
    """A load is refused if the entry's, the loaded and the new adapter together have too many tenants."""
    bed = await bed_with_lora(tmp_path)
    await bed.apply({**ENTRY, "adapters": many(1, 4000)})
    await load(bed, tenants=[f"t{number}" for number in range(90)])
    error = await refused(load(bed, adapter="b", tenants=[f"t{number}" for number in range(7)]))
    assert [one.field for one in error.violations] == ["models[l].adapters"]
    await load(bed, tenants=[f"t{number}" for number in range(96)])


async def test_an_adapter_of_an_old_version_blocks_no_load(tmp_path: Path) -> None:
    """An adapter of a version that the model no longer has does not prevent loads of other adapters."""
    bed = await bed_with_lora(tmp_path)
    await load(bed, version="v1")
    await bed.apply({**ENTRY, "version": "v2"})
    await load(bed, adapter="b")
    assert [name for name, _ in await published(bed)] == ["own", "a", "b"]
    assert [one.field for one in (await refused(load(bed, version="v1"))).violations] == ["version"]


@pytest.mark.parametrize(
    ("entries", "field"),
    [
        ([{"name": "m", "source": "/m", "aliases": ["k", "l:a"]}], "models[m].aliases[1]"),
        ([{"name": "m", "source": "/m", "aliases": ["x:a"]}], "models[m].aliases[0]"),
        ([{**ENTRY, "aliases": ["x", "l:a"]}], "models[l].aliases[1]"),
        ([{**ENTRY, "aliases": ["x", "y"]}, {"name": "m", "source": "/m", "aliases": ["y:a"]}], "models[m].aliases[0]"),
    ],
)
async def test_a_name_of_a_loaded_adapter_is_no_alias(
    tmp_path: Path, entries: list[dict[str, Any]], field: str
) -> None:
    """Apply refuses an alias that is also a name of a loaded adapter, and accepts it when the adapter is unloaded."""
    bed = await bed_with_lora(tmp_path)
    await load(bed)
    error = await refused(bed.apply(*entries))
    assert error.outcome is Outcome.INVALID_FIELD
    assert [(one.field, "adapter 'l:a'" in one.description) for one in error.violations] == [(field, True)]
    await unload(bed, "a")
    await bed.apply(*entries)


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
