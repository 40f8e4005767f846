"""Tests of retired applications: the time from the retirement until an application may be deleted."""

from __future__ import annotations

from cluster.controller.links import FleetWorker
from cluster.controller.retired_apps import QUIET_S, RetiredApps
from cluster.policy.catalog.reconcile import Observed
from cluster.ray.backend import RaySnapshot


def test_an_application_without_calls_is_deletable_after_a_moment() -> None:
    """A retired application may be deleted after a moment if the gateways report no call for it, otherwise after the
    drain time."""
    app = Observed("m", "d1", 1, running=1)
    snapshot, retired = RaySnapshot({app.app: app}, ()), RetiredApps(60.0)
    retired.update([app.app], 100.0)
    retired.update([app.app], 101.0)
    assert app.app in retired
    busy = [FleetWorker("w", "i", "m", running=1, generation="d1")]
    quiet_s = 100.0 + QUIET_S
    assert not retired.deletable(snapshot, [], (), True, quiet_s - 1), "the gateways may not have reported yet"
    assert not retired.deletable(snapshot, [], (), False, quiet_s), "no gateway reports"
    assert not retired.deletable(snapshot, busy, (), True, quiet_s)
    assert not retired.deletable(snapshot, [], {"m"}, True, quiet_s)
    assert retired.deletable(snapshot, [], (), True, quiet_s) == {app.app}
    assert retired.deletable(snapshot, busy, {"m"}, False, 160.0) == {app.app}
    retired.update([], 161.0)
    assert app.app not in retired


def test_an_application_is_kept_until_another_has_its_adapters() -> None:
    """A retired application without calls is kept while each worker that replaces its workers has loaded fewer
    adapters, but not beyond the drain time."""
    app = Observed("m", "d1", 1, running=1)
    snapshot, retired = RaySnapshot({app.app: app}, ()), RetiredApps(60.0)
    retired.update([app.app], 100.0)
    old = FleetWorker("w", "i", "m", version="v1", generation="d1", adapters_ready=2)
    for version, ready, is_kept in (("v1", 1, True), ("v1", 2, False), ("v2", 0, False)):
        new = FleetWorker("x", "j", "m", version=version, generation="d2", adapters_ready=ready)
        assert bool(retired.deletable(snapshot, [old, new], (), True, 110.0)) is not is_kept
        assert retired.deletable(snapshot, [old, new], (), True, 160.0)
