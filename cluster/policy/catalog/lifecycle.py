"""State machine of a model, and the catalog entries that the controller sends to the gateways. The functions do no I/O.

A controller holds no state that must survive a restart. Each pass applies a new observation of the cluster to the state
of the pass before. When a controller starts, every model is in the state DECLARED, and after one pass all states are
correct.
"""

from __future__ import annotations

import dataclasses
import datetime
import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from cluster.api.pooling import PoolingTask
from cluster.api.types import CatalogEntry, ModelSpec, ModelState, VersionShare
from cluster.policy.catalog.reconcile import Observed
from cluster.policy.catalog.versions import ReplicaShare


class ModelObservation(enum.StrEnum):
    """Observations of a model by the controller in one pass."""

    ABSENT = "wanted, and Ray has no application for it"
    RESTING = "wanted with zero replicas, and none is left"
    UNPLACED = "replicas are wanted and none has a process"
    STARTING = "a replica has a process and none serves"
    SERVING = "a replica serves"
    BROKEN = "nothing serves, and Ray or the replicas say why"
    WITHDRAWN = "no longer wanted, and Ray still has its application"
    ENDED = "no longer wanted, and Ray has nothing left of it"


class IllegalMove(Exception):
    """Raised for an observation that cannot follow the current state."""


_FROM_ANY: dict[ModelObservation, ModelState] = {
    ModelObservation.ABSENT: ModelState.DECLARED,
    ModelObservation.RESTING: ModelState.IDLE,
    ModelObservation.UNPLACED: ModelState.PLACING,
    ModelObservation.STARTING: ModelState.LOADING,
    ModelObservation.SERVING: ModelState.READY,
    ModelObservation.BROKEN: ModelState.FAILED,
    ModelObservation.WITHDRAWN: ModelState.DRAINING,
    ModelObservation.ENDED: ModelState.GONE,
}

# Ray and the file change between passes, so any observation may follow any state. The exception: a GONE model must be
# declared again before any other observation of that model.
MOVES: dict[tuple[ModelState, ModelObservation], ModelState] = {
    (state, observe): after
    for state in ModelState
    for observe, after in _FROM_ANY.items()
    if state is not ModelState.GONE or observe in (ModelObservation.ABSENT, ModelObservation.ENDED)
}


def next_state(state: ModelState, observation: ModelObservation) -> ModelState:
    """Return the state that follows `state` after `observation`. Raises IllegalMove."""
    try:
        return MOVES[state, observation]
    except KeyError:
        raise IllegalMove(f"{state.name}: {observation.name} ({observation.value}) cannot follow") from None


def observe(wanted: bool, seen: Observed | None, unplaceable: str = "") -> ModelObservation:
    """Return the controller's observation of one model in this pass.

    `wanted`: whether the model should run. `seen`: the merged observation of the model's applications; None if there
    are none. `unplaceable`: the reason why no replica can be placed on the nodes, or "".
    """
    if not wanted:
        return ModelObservation.ENDED if seen is None else ModelObservation.WITHDRAWN
    if seen is None or seen.deleting:
        return ModelObservation.ABSENT
    if seen.running:
        return ModelObservation.SERVING
    if seen.target == 0 and seen.digest:
        return ModelObservation.RESTING
    if seen.refused or seen.gave_up or (seen.trouble and not seen.placed):
        return ModelObservation.BROKEN
    if seen.placed:
        return ModelObservation.STARTING
    return ModelObservation.BROKEN if unplaceable else ModelObservation.UNPLACED


def merge_applications(wanted: Sequence[Observed], before: Sequence[Observed]) -> Observed | None:
    """Merge the applications of one version into one observation. Return None if there are no applications.

    `wanted`: the wanted applications. `before`: older applications, which serve until the wanted ones are ready.
    Failures of wanted applications are reported even while older applications serve.
    """
    there = [app for app in wanted if not app.deleting]
    others = [app for app in before if not app.deleting]
    if not there and not others:
        return wanted[0] if wanted else None
    first = (there or others)[0]
    return dataclasses.replace(
        first,
        target=sum(app.target for app in there or others),
        running=sum(app.running for app in (*there, *others)),
        placed=sum(app.placed for app in (*there, *others)),
        leaving=sum(app.leaving for app in (*there, *others)),
        gave_up=bool(there) and all(app.gave_up for app in there),
        refused=bool(there) and all(app.refused for app in there),
        trouble=next((app.trouble for app in there if app.trouble), ""),
    )


@dataclass(frozen=True, slots=True)
class WorkerReport:
    """Report of one worker to the gateways about the model that the worker serves."""

    weight_digest: str = ""
    bundle_digest: str = ""
    max_model_len: int = 0
    engine_class: str = ""
    default_sampling: Mapping[str, object] = field(default_factory=dict)
    tasks: tuple[PoolingTask, ...] = ()


@dataclass(frozen=True, slots=True)
class SourceFacts:
    """Facts about a model, read from its source without a worker. `trouble`: why the source is unusable, or ""."""

    bundle_digest: str = ""
    max_model_len: int = 0
    family: str = ""
    default_sampling: Mapping[str, object] = field(default_factory=dict)
    trouble: str = ""
    license: str = ""
    card: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Version:
    """Current state of one version of a model, as the controller sees it."""

    spec: ModelSpec
    share: ReplicaShare
    state: ModelState
    seen: Observed | None = None
    reported: Sequence[WorkerReport] = ()
    known: SourceFacts | None = None
    unplaceable: str = ""
    desired: int = 0
    changing: bool = False
    """Whether another application of this version is about to replace the serving application."""
    lost: str = ""
    """Text of `summarize_ends` about engines of this version that ended in the last minutes; "" if none ended."""


def entry_of(versions: Sequence[Version], *, retired: Sequence[str] = (), cold_start_s: float = 0.0) -> CatalogEntry:
    """Return the catalog entry of a model with all its versions. `versions`: the versions, the stable one first.
    `retired`: generations (digests of replica settings) whose workers get no new calls."""
    stable = versions[0]
    stable_entry = entry(
        stable.spec,
        stable.state,
        stable.seen,
        reported=stable.reported,
        known=stable.known,
        unplaceable=stable.unplaceable,
        lost=stable.lost,
        cold_start_s=cold_start_s,
    )
    parts = tuple(_share(version) for version in versions)
    state, reasons = stable.state, [] if not stable_entry.state_reason else [stable_entry.state_reason]
    if state is not ModelState.READY and any(part.state is ModelState.READY and part.weight for part in parts):
        state, reasons = (
            ModelState.READY,
            [f"{stable.spec.version} is {stable.state.lower()}: {stable_entry.state_reason}"],
        )
    reasons += [f"{part.version}: {part.state_reason}" for part in parts[1:] if part.state_reason]
    if stable.changing and state is ModelState.READY:
        reasons.append("being replaced" + (f", which fails: {trouble}" if (trouble := _trouble(stable)) else ""))
    return dataclasses.replace(
        stable_entry,
        state=state,
        state_reason="; ".join(reasons),
        replicas=sum(part.replicas for part in parts),
        replicas_desired=sum(part.replicas_desired for part in parts),
        versions=parts,
        retired=tuple(sorted(retired)),
    )


def _trouble(version: Version) -> str:
    return (version.seen.trouble if version.seen else "") or version.unplaceable


def _share(version: Version) -> VersionShare:
    about = version.known or SourceFacts()
    spec, reported = version.spec, version.reported
    reason = version.share.gone or _reason(version.state, version.seen, about, version.unplaceable, version.lost)
    if version.share.quarantined:
        reason = "; ".join(("quarantined", reason) if reason else ("quarantined",))
    return VersionShare(
        version=spec.version,
        weight=version.share.weight,
        revision=spec.revision,
        state=version.state,
        state_reason=reason,
        bundle_digest=next((r.bundle_digest for r in reported if r.bundle_digest), "") or about.bundle_digest,
        weight_digests=(spec.digest,)
        if spec.digest
        else tuple(sorted({r.weight_digest for r in reported if r.weight_digest})),
        weights_pinned=bool(spec.digest),
        replicas=version.seen.running if version.seen else 0,
        replicas_desired=version.desired,
        quarantined=version.share.quarantined,
        ttft_ratio=spec.ttft_ratio,
    )


def entry(
    spec: ModelSpec,
    state: ModelState,
    seen: Observed | None,
    *,
    reported: Sequence[WorkerReport] = (),
    known: SourceFacts | None = None,
    unplaceable: str = "",
    lost: str = "",
    cold_start_s: float = 0.0,
) -> CatalogEntry:
    """Return the catalog entry of a model with one version. Values that workers report replace values from the
    model's source.

    `seen`: what was observed of the model's application. `reported`: reports of the model's workers. `known`:
    properties read from the source. `unplaceable`: reason why no replica fits on the nodes. `lost`: reason why
    a replica was lost. The reasons are "" if there are none.
    """
    about = known or SourceFacts()
    first = reported[0] if reported else None
    return CatalogEntry(
        name=spec.name,
        aliases=spec.aliases,
        version=spec.version,
        revision=spec.revision,
        state=state,
        state_reason=_reason(state, seen, about, unplaceable, lost),
        bundle_digest=(first.bundle_digest if first else "") or about.bundle_digest,
        weight_digests=(spec.digest,)
        if spec.digest
        else tuple(sorted({r.weight_digest for r in reported if r.weight_digest})),
        weights_pinned=bool(spec.digest),
        max_model_len=(first.max_model_len if first else 0) or spec.max_model_len or about.max_model_len,
        default_sampling=first.default_sampling if first else about.default_sampling,
        sampling=spec.sampling,
        cold_start_s=cold_start_s,
        replicas=seen.running if seen else 0,
        replicas_desired=spec.replicas,
        family=about.family,
        license=spec.license or about.license,
        engine_class=first.engine_class if first else "",
        fallback=spec.fallback,
        card=about.card,
        tasks=first.tasks if first else (),
        slo_ttft_s=spec.slo_ttft_s,
        slo_itl_s=spec.slo_itl_s,
        slo_target=spec.slo_target,
    )


def summarize_ends(ends: Sequence[tuple[float, str]]) -> str:
    """Return a text about engines that have ended: their number, and the time and the reason of the latest end.

    `ends` are pairs of (seconds since the epoch, reason).
    """
    if not ends:
        return ""
    at_s, why = max(ends)
    when = datetime.datetime.fromtimestamp(at_s, datetime.UTC).strftime("%H:%M:%S UTC")
    count = "a replica's engine" if len(ends) == 1 else f"{len(ends)} replicas' engines ended lately, the last"
    return f"{count} ended at {when}: {why}"


def _reason(state: ModelState, seen: Observed | None, known: SourceFacts, unplaceable: str, lost: str = "") -> str:
    if state is ModelState.READY:
        short = seen is not None and seen.running < seen.target
        serving = f"{seen.running} of {seen.target} replicas serve" if seen and short else ""
        return "; ".join(filter(None, (serving, lost)))
    trouble = (seen.trouble if seen else "") or unplaceable
    if state in (ModelState.PLACING, ModelState.LOADING) and not trouble and lost:
        return lost
    if state is ModelState.PLACING and not trouble:
        return "waiting for Ray to place it"
    return trouble or known.trouble


def fill_from_earlier(entry_before: CatalogEntry | None, now: CatalogEntry) -> CatalogEntry:
    """Return the entry `now`, with empty fields filled from the earlier entry `entry_before`. With these fields,
    gateways can tokenize for a model that has no workers."""
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
        license=now.license or entry_before.license,
        card=now.card or entry_before.card,
        tasks=now.tasks if now.engine_class else entry_before.tasks,
        versions=tuple(_remember_share(entry_before.versions, share) for share in now.versions),
    )


def _remember_share(before: Sequence[VersionShare], now: VersionShare) -> VersionShare:
    """Return the share `now` with empty digests filled from the earlier share of the same version and revision."""
    old = next((share for share in before if (share.version, share.revision) == (now.version, now.revision)), None)
    if old is None:
        return now
    return dataclasses.replace(
        now,
        bundle_digest=now.bundle_digest or old.bundle_digest,
        weight_digests=now.weight_digests or old.weight_digests,
    )
