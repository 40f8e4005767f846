"""Catalog entries of held models. The functions do no I/O.

A model is held while its entry in the catalog file is invalid: the running replicas are left unchanged, and the catalog
entry for the gateways is derived from these replicas.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from cluster.api.types import CatalogEntry, ModelSpec, ModelState
from cluster.policy.catalog import lifecycle
from cluster.policy.catalog.lifecycle import SourceFacts, WorkerReport
from cluster.policy.catalog.reconcile import Observed
from cluster.policy.catalog.versions import ReplicaShare

HELD_REASON = "its entry in the controller's file is wrong, so what runs of it is kept as it is"


def held_entry(spec: ModelSpec, apps: Sequence[Observed], reported: Sequence[WorkerReport]) -> CatalogEntry:
    """Return the entry that gateways get for a held model. A model is held while its entry in the catalog file is
    invalid.

    `spec` supplies only the name, the aliases and the fallbacks. `apps`: the model's applications on Ray. All calls go
    to the version with the most running replicas.
    """
    by_version: dict[str, list[Observed]] = {}
    for app in apps:
        by_version.setdefault(app.version, []).append(app)
    order = sorted(by_version, key=lambda version: -sum(app.running for app in by_version[version]))
    if not order:
        return lifecycle.entry(spec, ModelState.FAILED, None, known=SourceFacts(trouble=HELD_REASON))
    versions = []
    for at, version in enumerate(order):
        whole = lifecycle.merge_applications(by_version[version], ())
        sight = lifecycle.observe(True, whole)
        if sight is lifecycle.ModelObservation.SERVING and not reported:
            sight = lifecycle.ModelObservation.STARTING  # replicas run, but no gateway has a link to one of them yet
        versions.append(
            lifecycle.Version(
                replace(spec, version=version),
                ReplicaShare(version, 0.0 if at else 1.0),
                lifecycle.next_state(ModelState.DECLARED, sight),
                whole,
                reported,
                desired=whole.target if whole is not None else 0,
            )
        )
    entry = lifecycle.entry_of(versions)
    return replace(entry, state_reason="; ".join(filter(None, (entry.state_reason, HELD_REASON))))
