"""Tests of operators' catalog changes. A change is validated as a whole and then stored. Replicas of models that a
change does not touch are not restarted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cluster.admin.v1 import catalog_pb2 as pb
from cluster.api.outcomes import CallError, Outcome
from cluster.config.document import parse
from cluster.controller.catalog_overlay import CatalogOverlayFile
from cluster.controller.catalog_service import StoredCatalogService
from cluster.controller.catalog_verbs import catalog_verbs
from cluster.controller.controller import Controller
from cluster.controller.desired_models import DesiredModels
from cluster.controller.editable_catalog import EditableCatalog
from cluster.controller.published_catalog import PublishedCatalog
from cluster.controller.replica_settings import settings_of
from tests.controller.test_controller import FakeGateways
from tests.support.fake_ray import FakeRay

FILE = """
api_version: headrace/v1
name: test
weights: {allow: {formats: [safetensors]}}
models:
  - {name: m, source: /m, aliases: [default], replicas: {min: 1, max: 2}}
  - {name: n, source: /n}
"""
CANARY = {"version": "v2", "revision": "b", "weight": 0.25}


class CatalogBed:
    """A catalog service with a controller and a fake Ray, for tests. `life`: instance id of the local cluster; "" for
    other clusters. `by_file`: whether the models of the file can be changed only in the file. `is_whole`: whether no
    part of the file is invalid."""

    def __init__(
        self,
        folder: Path,
        *,
        life: str = "one",
        by_file: bool = False,
        is_whole: bool = True,
        ray: FakeRay | None = None,
        text: str = FILE,
    ) -> None:
        self.ray = ray or FakeRay()
        self.gateways = FakeGateways(linked=0)
        models, published = DesiredModels(), PublishedCatalog()
        self.catalog = EditableCatalog(
            parse(text),
            models,
            CatalogOverlayFile(folder / "catalog.json", life),
            lambda config: settings_of(config, gateways=["g:1"], local=True),
            by_file=by_file,
            is_whole=is_whole,
        )
        self.controller = Controller(
            self.ray, self.gateways, models, published, keep_overrides=self.catalog.store, wall_s=lambda: 0.0
        )
        self.verbs = catalog_verbs(StoredCatalogService(self.catalog, models, published))

    async def apply(self, *entries: dict[str, Any], **options: Any) -> pb.ApplyResponse:
        """Send an Apply request as the admin API does."""
        request = pb.ApplyRequest(document=json.dumps({"models": entries}).encode(), **options)
        return pb.ApplyResponse.FromString(await self.verbs["Catalog.Apply"](request.SerializeToString(), "key:k1"))

    async def ask(self, verb: str, request: Any) -> dict[str, tuple[float, str]]:
        """Send an admin request about a model's versions. Return the weight and the reason of each version after the
        request."""
        answer = pb.VersionsResponse.FromString(await self.verbs[verb](request.SerializeToString(), "key:k1"))
        return {version.version: (version.weight, version.state_reason) for version in answer.versions}

    async def up(self) -> None:
        """Run passes until all wanted replicas serve."""
        await self.controller.step()
        for app, seen in self.ray.apps.items():
            self.ray.change(app, running=seen.target)
        await self.controller.step()
        self.ray.journal.clear()


async def refused(awaitable: Any) -> CallError:
    """Return the error of a request that must fail."""
    with pytest.raises(CallError) as caught:
        await awaitable
    return caught.value


async def test_only_what_differs_is_touched(tmp_path: Path) -> None:
    """Apply deploys a model that is new. A change of names, bounds or fallbacks restarts no replica. A second Apply
    with the same entries changes nothing."""
    bed = CatalogBed(tmp_path)
    await bed.up()
    entries: tuple[dict[str, Any], ...] = (
        {"name": "m", "source": "/m", "aliases": ["other"], "replicas": {"min": 1, "max": 9}, "fallback": ["o"]},
        {"name": "o", "source": "/o"},
    )
    changes = (await bed.apply(*entries, validate_only=True)).changes
    assert [(one.model, one.kind, one.restarts) for one in changes] == [("m", "change", ""), ("o", "add", "")]
    await bed.controller.step()
    assert bed.ray.journal == [], "nothing was to change"
    assert (await bed.apply(*entries)).changes == changes
    await bed.controller.step()
    assert bed.ray.journal == ["deploy o"]
    assert bed.gateways.published["m"].fallback == ("o",)
    assert not (await bed.apply(*entries)).changes
    (gone,) = (await bed.apply(*entries, prune=True)).changes
    assert (gone.model, gone.kind) == ("n", "remove")
    changed = (await bed.apply({"name": "o", "source": "/o", "engine": {"max_num_seqs": 4}})).changes[0]
    assert (changed.differences[0].path, changed.differences[0].after_json) == ("engine.max_num_seqs", "4")
    assert "replaced" in changed.restarts


@pytest.mark.parametrize(
    ("entry", "field", "told"),
    [
        ({"name": "o", "source": "/o", "engin": {}}, "models[o].engin", "unknown key"),
        ({"name": "o"}, "models[o].source", "required"),
        ({"name": "o", "source": "/o", "aliases": ["default"]}, "models[o].aliases[0]", "is used by"),
        ({"name": "o", "source": "/o", "load_format": "pt"}, "models[o].load_format", "weights.allow.formats"),
        ({"name": "o", "source": "/o", "fallback": ["p"]}, "models[o].fallback[0]", "no model 'p'"),
        ({"name": "o", "source": "/o", "canary": {"version": "v1"}}, "models[o]", "give the canary another"),
        ({"name": "o", "source": "/o", "engine": {"dtype": "float16"}}, "models[o].engine.dtype", "set `dtype` beside"),
        ({"name": "o", "source": "/o", "adapters": [{"name": "a"}]}, "models[o].adapters[0].source", "required"),
    ],
)
async def test_one_wrong_entry_changes_nothing(tmp_path: Path, entry: dict[str, Any], field: str, told: str) -> None:
    """If one entry of a request is wrong, the request fails with an error that names the model and the wrong key. The
    request's valid entry is not applied either."""
    bed = CatalogBed(tmp_path)
    await bed.up()
    error = await refused(bed.apply({"name": "right", "source": "/r"}, entry))
    assert error.outcome is Outcome.INVALID_FIELD
    assert [(one.field, told in one.description) for one in error.violations] == [(field, True)]
    await bed.controller.step()
    assert bed.ray.journal == []
    assert not (tmp_path / "catalog.json").exists()


async def test_what_was_applied_outlives_the_controller_and_not_the_cluster(tmp_path: Path) -> None:
    """The next controller of the same cluster continues with the applied models. The next `headrace up` starts from the
    file."""
    bed = CatalogBed(tmp_path)
    await bed.apply({"name": "o", "source": "/o"})
    await bed.apply({"name": "m", "source": "/m2"})
    successor = CatalogBed(tmp_path)
    assert {model.name: model.source for model in successor.catalog.config.models} == {"m": "/m2", "n": "/n", "o": "/o"}
    assert [model.name for model in CatalogBed(tmp_path, life="two").catalog.config.models] == ["m", "n"]
    (tmp_path / "catalog.json").write_text("{")
    assert [model.name for model in CatalogBed(tmp_path).catalog.config.models] == ["m", "n"]


async def test_models_of_a_file_are_the_files(tmp_path: Path) -> None:
    """Apply can add models to those of the catalog file, and the next controller still has them. Apply refuses to
    change a model of the file."""
    bed = CatalogBed(tmp_path, life="", by_file=True)
    same = {"name": "m", "source": "/m", "aliases": ["default"], "replicas": {"max": 2}}
    assert [one.model for one in (await bed.apply(same, {"name": "o", "source": "/o"})).changes] == ["o"]
    error = await refused(bed.apply({"name": "m", "source": "/else"}, {"name": "p", "source": "/p"}))
    assert (error.outcome, error.violations[0].field) == (Outcome.MANAGED_BY_FILE, "models[m]")
    error = await refused(bed.apply({"name": "o", "source": "/o"}, prune=True))
    assert error.outcome is Outcome.MANAGED_BY_FILE
    successor = CatalogBed(tmp_path, life="", by_file=True)
    assert [model.name for model in successor.catalog.config.models] == ["m", "n", "o"]


async def test_a_diff_shows_models_of_a_file_too(tmp_path: Path) -> None:
    """Diff also shows changes to models of the configuration file, although Apply refuses such changes. Diff does not
    change the catalog."""
    bed = CatalogBed(tmp_path, life="", by_file=True)

    async def diff(*entries: dict[str, Any]) -> list[tuple[str, str]]:
        request = pb.DiffRequest(document=json.dumps({"models": entries}).encode(), prune=True)
        answer = await bed.verbs["Catalog.Diff"](request.SerializeToString(), "key:k1")
        return [(change.model, change.kind) for change in pb.DiffResponse.FromString(answer).changes]

    same: list[dict[str, Any]] = [
        {"name": "m", "source": "/m", "aliases": ["default"], "replicas": {"max": 2}},
        {"name": "n", "source": "/n"},
    ]
    assert await diff(*same) == []
    assert await diff({**same[0], "source": "/else"}) == [("m", "change"), ("n", "remove")]
    assert [model.source for model in bed.catalog.config.models] == ["/m", "/n"]


async def test_weights_rollback_and_promotion(tmp_path: Path) -> None:
    """Requests that set the weight of a version, roll it back, quarantine it or promote it return the new shares of the
    calls. A rollback survives a restart of the controller. A promotion restarts no replica."""
    bed = CatalogBed(tmp_path)
    await bed.apply({"name": "m", "source": "/m", "aliases": ["default"], "canary": CANARY})
    await bed.up()
    weights = pb.SetWeightsRequest(name="default", version="v1", weight=0.25)
    assert await bed.ask("Catalog.SetWeights", weights) == {"v1": (0.25, ""), "v2": (0.75, "")}
    back = await bed.ask("Catalog.Rollback", pb.RollbackRequest(name="m", reason="slow"))
    assert back == {"v1": (1.0, ""), "v2": (0.0, "rolled back: slow")}
    successor = CatalogBed(tmp_path, ray=bed.ray)
    await successor.controller.step()
    entry = successor.gateways.published["m"]
    assert [(share.version, share.weight) for share in entry.versions] == [("v1", 1.0), ("v2", 0.0)]
    assert len(entry.retired) == 1
    assert await successor.ask("Catalog.SetWeights", pb.SetWeightsRequest(name="m", version="v2", weight=0.5)) == {
        "v1": (0.5, ""),
        "v2": (0.5, ""),
    }
    quarantined = await successor.ask("Catalog.Quarantine", pb.QuarantineRequest(name="m", version="v2"))
    assert quarantined["v2"] == (0.5, "quarantined")
    lifted = await successor.ask("Catalog.Quarantine", pb.QuarantineRequest(name="m", version="v2", lift=True))
    assert lifted["v2"] == (0.5, "")
    promoted = await successor.ask("Catalog.Promote", pb.PromoteRequest(name="m"))
    assert promoted == {"v2": (1.0, "")}
    bed.ray.journal.clear()
    await successor.controller.step()
    assert bed.ray.journal == []
    assert [one.version for one in successor.gateways.published["m"].versions] == ["v2"]


@pytest.mark.parametrize(
    ("verb", "request_", "outcome"),
    [
        ("Catalog.Promote", pb.PromoteRequest(name="n"), Outcome.INVALID_FIELD),
        ("Catalog.Rollback", pb.RollbackRequest(name="nobody"), Outcome.MODEL_NOT_FOUND),
        ("Catalog.SetWeights", pb.SetWeightsRequest(name="m", version="v2", weight=1.5), Outcome.INVALID_FIELD),
        ("Catalog.SetWeights", pb.SetWeightsRequest(name="m", version="v9", weight=0.5), Outcome.INVALID_FIELD),
        ("Catalog.Quarantine", pb.QuarantineRequest(name="m", version="v9"), Outcome.INVALID_FIELD),
        ("Catalog.Apply", pb.ApplyRequest(document=b"{"), Outcome.INVALID_FIELD),
        ("Catalog.Apply", pb.ApplyRequest(document=b'{"models": [1]}'), Outcome.INVALID_FIELD),
    ],
)
async def test_what_cannot_be_done_is_said(tmp_path: Path, verb: str, request_: Any, outcome: Outcome) -> None:
    """A request that cannot be carried out fails with the expected outcome and changes nothing."""
    bed = CatalogBed(tmp_path)
    await bed.apply({"name": "m", "source": "/m", "canary": CANARY})
    kept = (tmp_path / "catalog.json").read_text()
    error = await refused(bed.verbs[verb](request_.SerializeToString(), "key:k1"))
    assert error.outcome is outcome
    assert (tmp_path / "catalog.json").read_text() == kept
