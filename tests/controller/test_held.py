"""Tests of a controller that starts with invalid model entries. The replicas of these models keep running and stay
published, and the last valid entries are used."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from cluster.api.types import ModelSpec, ModelState
from cluster.config.document import parse
from cluster.config.lenient import for_controller
from cluster.controller.last_good import with_last_good
from cluster.controller.links import FleetWorker
from cluster.controller.replica_settings import settings_of
from cluster.policy.catalog.held import HELD_REASON
from tests.controller.test_controller import FakeGateways, controller, settings
from tests.support.fake_ray import FakeRay

HEAD = "api_version: headrace/v1\nname: c\n"
A = "{name: a, source: /a, aliases: [first]}"
B = "{name: b, source: /b, aliases: [second]}"
WRONG_B = "{name: b, source: /b, aliases: [second], replicas: {min: 4, max: 2}}"


async def test_what_runs_of_a_wrong_entry_is_not_touched() -> None:
    """A model with an invalid entry does not count as removed. Its replicas keep running and stay published."""
    ray, gateways = FakeRay(), FakeGateways()
    await controller(ray, gateways, settings("a"), settings("b")).step()
    for name in ("a", "b"):
        ray.change(name, running=1)
        gateways.workers.append(FleetWorker(f"w{name}", "i", name, bundle_digest=f"sha256:{name}", max_model_len=9))
    ray.journal.clear()
    loop = controller(ray, gateways, settings("a"))
    loop.models.hold([ModelSpec("b", "", ("second",), fallback=("a",))])
    for _ in range(3):
        await loop.step()
    assert ray.journal == []
    entry = gateways.published["b"]
    assert (entry.state, entry.aliases, entry.fallback) == (ModelState.READY, ("second",), ("a",))
    assert (entry.bundle_digest, entry.max_model_len, entry.replicas) == ("sha256:b", 9, 1)
    assert HELD_REASON in entry.state_reason
    loop.models.hold([])
    await loop.step()
    assert gateways.state("b") is ModelState.DRAINING, "an entry that is gone and not invalid is removed"


async def test_everything_is_held_where_no_entry_can_be_read() -> None:
    """If the `models` section is not a list, no model is deleted."""
    ray, gateways = FakeRay(), FakeGateways()
    await controller(ray, gateways, settings("a"), settings("b")).step()
    for name in ("a", "b"):
        ray.change(name, running=1)
    ray.journal.clear()
    loop = controller(ray, gateways)
    loop.models.hold([], everything=True)
    await loop.step()
    assert (ray.journal, set(gateways.published)) == ([], {"a", "b"})


async def test_a_trial_gets_no_call_while_its_model_is_held() -> None:
    """If a model's configuration is invalid, the version with the most replicas gets all its calls, since the
    configured shares are unknown."""
    ray, gateways = FakeRay(), FakeGateways()
    await controller(ray, gateways, settings("m"), settings("m", version="v2")).step()
    first, second = ray.app_of("m"), ray.app_of("m", "v2")
    ray.apps[first] = dataclasses.replace(ray.apps[first], running=1)
    ray.apps[second] = dataclasses.replace(ray.apps[second], running=3, target=3)
    loop = controller(ray, gateways)
    loop.models.hold([ModelSpec("m", "")])
    await loop.step()
    assert [(one.version, one.weight) for one in gateways.published["m"].versions] == [("v2", 1.0), ("v1", 0.0)]


async def test_a_held_model_that_runs_nowhere_says_why() -> None:
    """If a model's catalog entry is invalid and the model has no replicas, its state is FAILED. The reason says that
    the entry is invalid."""
    gateways = FakeGateways()
    loop = controller(FakeRay(), gateways)
    loop.models.hold([ModelSpec("b", "", ("second",))])
    await loop.step()
    assert (gateways.state("b"), gateways.published["b"].state_reason) == (ModelState.FAILED, HELD_REASON)


def test_the_last_right_entry_takes_the_place_of_a_wrong_one(tmp_path: Path) -> None:
    """A controller that restarts with the same run folder uses the last valid entries. Equal digests show that no
    replica is replaced."""
    valid = with_last_good(for_controller(f"{HEAD}models: [{A}, {B}]"), tmp_path).config
    found = with_last_good(for_controller(f"{HEAD}models: [{A}, {WRONG_B}]"), tmp_path)
    assert found.held == ()

    def digests(config: object) -> list[str]:
        return sorted(one.digest for one in settings_of(config, gateways=["g:1"], local=True))  # type: ignore[arg-type]

    assert digests(found.config) == digests(valid)
    again = with_last_good(for_controller(f"{HEAD}models: [{A}, {WRONG_B}]"), tmp_path)
    assert digests(again.config) == digests(valid), "also at the second start with the wrong file"
    whole = with_last_good(for_controller(f"{HEAD}models: 3"), tmp_path)
    assert (whole.all_held, digests(whole.config)) == (False, digests(valid))
    gone = with_last_good(for_controller(f"{HEAD}models: [{A}]"), tmp_path)
    assert [model.name for model in gone.config.models] == ["a"]
    assert [one.name for one in with_last_good(for_controller(f"{HEAD}models: [{WRONG_B}]"), tmp_path).held] == ["b"]


def test_without_an_earlier_start_the_model_is_held(tmp_path: Path) -> None:
    """A model with an invalid entry is held (its replicas stay unchanged) if the file of the stored entries is missing
    or damaged."""
    text = f"{HEAD}models: [{A}, {WRONG_B}]"
    (tmp_path / "last-good-models.json").write_text("{")
    found = with_last_good(for_controller(text), tmp_path)
    assert ([one.name for one in found.held], [one.name for one in found.config.models]) == (["b"], ["a"])
    assert parse(f"{HEAD}models: [{A}]").models[0] == found.config.models[0]
