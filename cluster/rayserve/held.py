"""Catalog entries of models whose entry in the file is wrong: told from what runs, which stays as it is. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from cluster.api.types import CatalogEntry, ModelSpec, ModelState
from cluster.control import catalog
from cluster.control.catalog import Known, Reported
from cluster.control.reconcile import Observed
from cluster.control.versions import Share

WHY = "its entry in the controller's file is wrong, so what runs of it is kept as it is"


def held_entry(spec: ModelSpec, apps: Sequence[Observed], reported: Sequence[Reported]) -> CatalogEntry:
    """What the gateways are told of a held model. `spec` has its name, aliases and fallbacks; all calls go to the
    version that runs most replicas."""
    by_version: dict[str, list[Observed]] = {}
    for seen in apps:
        by_version.setdefault(seen.version, []).append(seen)
    order = sorted(by_version, key=lambda version: -sum(one.running for one in by_version[version]))
    if not order:
        return catalog.entry(spec, ModelState.FAILED, None, known=Known(trouble=WHY))
    versions = []
    for at, version in enumerate(order):
        whole = catalog.combined(by_version[version], ())
        sight = catalog.sight(True, whole)
        if sight is catalog.Sight.SERVING and not reported:
            sight = catalog.Sight.STARTING  # it runs, and no gateway has its link yet
        versions.append(
            catalog.Version(
                replace(spec, version=version),
                Share(version, 0.0 if at else 1.0),
                catalog.move(ModelState.DECLARED, sight),
                whole,
                reported,
                desired=whole.target if whole is not None else 0,
            )
        )
    told = catalog.entry_of(versions)
    return replace(told, state_reason="; ".join(filter(None, (told.state_reason, WHY))))
