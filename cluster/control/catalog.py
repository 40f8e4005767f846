"""The life of a model as a table, and the catalog entries that the gateways are told. Pure.

A controller holds no state that it could lose: each pass folds what it sees now into the last state, and a controller
that has just started begins at DECLARED and is right after one pass.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from cluster.api.types import CatalogEntry, ModelSpec, ModelState
from cluster.control.reconcile import Observed


class Sight(enum.StrEnum):
    """What one pass can see of a model."""

    ABSENT = "wanted, and Ray has no application for it"
    RESTING = "wanted with zero replicas, and none is left"
    UNPLACED = "replicas are wanted and none has a process"
    STARTING = "a replica has a process and none serves"
    SERVING = "a replica serves"
    BROKEN = "nothing serves, and Ray or the replicas say why"
    WITHDRAWN = "no longer wanted, and Ray still has its application"
    ENDED = "no longer wanted, and Ray has nothing left of it"


class IllegalMove(Exception):
    """A sight that cannot follow a state."""


_FROM_ANY: dict[Sight, ModelState] = {
    Sight.ABSENT: ModelState.DECLARED,
    Sight.RESTING: ModelState.IDLE,
    Sight.UNPLACED: ModelState.PLACING,
    Sight.STARTING: ModelState.LOADING,
    Sight.SERVING: ModelState.READY,
    Sight.BROKEN: ModelState.FAILED,
    Sight.WITHDRAWN: ModelState.DRAINING,
    Sight.ENDED: ModelState.GONE,
}

# Every state may be followed by every sight, since Ray and the file change while nobody looks; except that what is
# gone must be declared again before anything of it is seen.
MOVES: dict[tuple[ModelState, Sight], ModelState] = {
    (state, sight): after
    for state in ModelState
    for sight, after in _FROM_ANY.items()
    if state is not ModelState.GONE or sight in (Sight.ABSENT, Sight.ENDED)
}


def move(state: ModelState, sight: Sight) -> ModelState:
    """The next state. Raises IllegalMove."""
    try:
        return MOVES[state, sight]
    except KeyError:
        raise IllegalMove(f"{state.name}: {sight.name} ({sight.value}) cannot follow") from None


def sight(wanted: bool, seen: Observed | None, unplaceable: str = "") -> Sight:
    """What this pass sees of one model. `unplaceable` says why no node could hold it, if so."""
    if not wanted:
        return Sight.ENDED if seen is None else Sight.WITHDRAWN
    if seen is None or seen.deleting:
        return Sight.ABSENT
    if seen.running:
        return Sight.SERVING
    if seen.target == 0 and seen.digest:
        return Sight.RESTING
    if seen.refused or seen.gave_up or (seen.trouble and not seen.placed):
        return Sight.BROKEN
    if seen.placed:
        return Sight.STARTING
    return Sight.BROKEN if unplaceable else Sight.UNPLACED


@dataclass(frozen=True, slots=True)
class Reported:
    """What one worker of a model told the gateways about itself."""

    weight_digest: str = ""
    bundle_digest: str = ""
    max_model_len: int = 0
    engine_class: str = ""
    default_sampling: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Known:
    """What is known of a model without any worker, from its source."""

    bundle_digest: str = ""
    max_model_len: int = 0
    family: str = ""
    default_sampling: Mapping[str, object] = field(default_factory=dict)
    trouble: str = ""


def entry(
    spec: ModelSpec,
    state: ModelState,
    seen: Observed | None,
    *,
    reported: Sequence[Reported] = (),
    known: Known | None = None,
    unplaceable: str = "",
    cold_start_s: float = 0.0,
) -> CatalogEntry:
    """One model as the gateways are told it. Workers' own words win over what the source says."""
    about = known or Known()
    first = reported[0] if reported else None
    return CatalogEntry(
        name=spec.name,
        aliases=spec.aliases,
        version=spec.version,
        revision=spec.revision,
        state=state,
        state_reason=_reason(state, seen, about, unplaceable),
        bundle_digest=(first.bundle_digest if first else "") or about.bundle_digest,
        weight_digests=(spec.digest,)
        if spec.digest
        else tuple(sorted({r.weight_digest for r in reported if r.weight_digest})),
        weights_pinned=bool(spec.digest),
        max_model_len=(first.max_model_len if first else 0) or spec.max_model_len or about.max_model_len,
        default_sampling=first.default_sampling if first else about.default_sampling,
        cold_start_s=cold_start_s,
        replicas=seen.running if seen else 0,
        replicas_desired=spec.replicas,
        family=about.family,
        engine_class=first.engine_class if first else "",
    )


def _reason(state: ModelState, seen: Observed | None, known: Known, unplaceable: str) -> str:
    if state is ModelState.READY:
        short = seen is not None and seen.running < seen.target
        return f"{seen.running} of {seen.target} replicas serve" if seen and short else ""
    trouble = (seen.trouble if seen else "") or unplaceable
    if state is ModelState.PLACING and not trouble:
        return "waiting for Ray to place it"
    return trouble or known.trouble


def remember(entry_before: CatalogEntry | None, now: CatalogEntry) -> CatalogEntry:
    """The entry with what an earlier one knew and no worker says now, so that a model at rest stays tokenizable."""
    if entry_before is None:
        return now
    return dataclasses.replace(
        now,
        bundle_digest=now.bundle_digest or entry_before.bundle_digest,
        weight_digests=now.weight_digests or entry_before.weight_digests,
        max_model_len=now.max_model_len or entry_before.max_model_len,
        default_sampling=now.default_sampling or entry_before.default_sampling,
        engine_class=now.engine_class or entry_before.engine_class,
        family=now.family or entry_before.family,
    )
