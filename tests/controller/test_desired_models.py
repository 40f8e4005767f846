"""Tests of the desired models: overrides of versions, models that are held, and models that are removed."""

from __future__ import annotations

import pytest

from cluster.api.types import ModelSpec
from cluster.controller.desired_models import DesiredModels
from cluster.policy.catalog.versions import VersionOverride
from tests.controller.test_controller import settings, two_versions


def test_overrides_are_of_wanted_versions() -> None:
    """An operator's override is dropped when its model version is no longer wanted. This also holds for an override
    that was restored from disk. Overriding an unknown version raises KeyError."""
    models, (stable, canary) = DesiredModels(), two_versions()
    models.want([stable, canary])
    models.restore({"m": {"v2": VersionOverride(canary.digest, weight=0.5)}, "other": {"v1": VersionOverride("d")}})
    assert models.overrides == {"m": {"v2": VersionOverride(canary.digest, weight=0.5)}}
    models.override("m", "v2", quarantined=True)
    assert [(part.weight, part.quarantined) for part in models.shares("m")] == [(0.5, False), (0.5, True)]
    for model, version in (("m", "v3"), ("n", "v1")):
        with pytest.raises(KeyError):
            models.override(model, version, gone="x")
    models.want([stable])
    assert not models.overrides


def test_an_override_of_another_digest_is_replaced() -> None:
    """A new override replaces an override that was set for earlier settings of the version; nothing of the old one is
    kept."""
    models, (stable, canary) = DesiredModels(), two_versions()
    models.want([stable, canary])
    models.restore({"m": {"v2": VersionOverride("earlier", gone="rolled back")}})
    models.override("m", "v2", weight=0.1)
    assert models.overrides["m"]["v2"] == VersionOverride(canary.digest, weight=0.1)


def test_what_is_not_wanted_leaves_unless_it_is_held() -> None:
    """A model on Ray that is no longer wanted is removed, unless its entry is invalid (the model is held). The removal
    uses the model's last spec. Every change of the wanted models sets `changed`, which starts a pass of the
    controller."""
    models = DesiredModels()
    models.want([settings("a", aliases=("first",)), settings("b")])
    models.want([settings("b")])
    assert models.changed.is_set()
    assert models.leaving({"a", "b"}) == {"a": settings("a", aliases=("first",)).spec}
    models.hold([ModelSpec("h", "")], everything=False)
    assert (set(models.held({"a"})), set(models.leaving({"a", "h"}))) == ({"h"}, {"a"})
    models.hold([], everything=True)
    assert (set(models.held({"a", "b"})), models.leaving({"a", "b"})) == ({"a"}, {})
    models.hold([])
    assert models.leaving({"a"}) == {"a": ModelSpec("a", "")}, "the spec was forgotten while the model did not leave"
