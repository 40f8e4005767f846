"""Reconciliation of wanted and observed applications on Ray. The result is the list of next steps. Pure.

Problem: Ray Serve restarts every replica of an application that is deployed again, even if nothing changed. But the
replicas of a model must be replaced under load without ending a call.

Invariants: the only change to an existing application is a change of the number of replicas. The name of an application
(`model@version+digest`) identifies everything that the replicas are started with, so a changed catalog entry becomes a
new application beside the old one. The old application stays until the new one serves with all its wanted replicas.
Then the old application gets no new calls, and is deleted once no call is left or the drain time is over. If the
replicas of both applications do not fit, the old application gives up one replica at a time, as long as Ray cannot
place a replica of the new application. A new application that fails to start, or for which the nodes have no room even
without the old one, takes no replica from the old one.

Steps are listed in the order in which they must run: steps that free GPUs come first.
"""

from __future__ import annotations

import re
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass

RETRY_S = 60.0
"""Seconds before a failed application is deployed again. An application that Ray refused is deployed again only when
its catalog entry changes."""
SETTLE_S = 30.0
"""Seconds for which a deployed application may be missing on Ray before the application is deployed again."""
SURGE_WAIT_S = 20.0
"""Seconds for which a new application waits for capacity before the old application gives up replicas."""

_APP = re.compile(r"(?P<model>[^@]+)@(?P<version>[^+]+)\+(?P<digest>[0-9a-f]+)")


def app_name(model: str, version: str, digest: str) -> str:
    """Return the name of the application for this model, version and digest. All replicas of applications with this
    name have equal settings."""
    return f"{model}@{version}+{digest}"


def app_parts(app: str) -> tuple[str, str, str]:
    """Model, version and digest in an application name; the inverse of `app_name`.

    A name of another form is returned as the model, with an empty version and digest.
    """
    match = _APP.fullmatch(app)
    return (match["model"], match["version"], match["digest"]) if match else (app, "", "")


@dataclass(frozen=True, slots=True)
class Observed:
    """Observed state of one of the cluster's applications on Ray.

    `running`, `placed` and `leaving`: numbers of replicas that serve, that start and that stop. `gave_up`: the
    deployment failed. `refused`: Ray rejected the settings. `trouble`: the reason why the last start failed, or "".
    `digest` is "" after a deployment until Ray shows the application.
    """

    model: str
    digest: str
    target: int
    running: int = 0
    placed: int = 0
    leaving: int = 0
    gave_up: bool = False
    refused: bool = False
    trouble: str = ""
    deleting: bool = False
    deployed_at_s: float = 0.0
    version: str = "v1"
    ray: str = "local"
    named: str = ""
    """Name of the application on Ray, if that name differs from `app_name` of the other fields; else ""."""
    gpu: str = ""
    """GPU type that the application was made for; "" for any type or an unknown type."""

    @property
    def app(self) -> str:
        """Name of the application on Ray, without the name of the Ray cluster."""
        return self.named or app_name(self.model, self.version, self.digest)

    @property
    def failed(self) -> bool:
        """Whether the application serves no calls and cannot recover by itself."""
        return not self.running and (self.gave_up or self.refused)


@dataclass(frozen=True, slots=True)
class Wanted:
    """An application that should run.

    `replicas`: wanted number. `digest` covers all settings with which replicas are started. `stale`: the running
    replicas have other weights than the catalog entry now asks for, and must be restarted. `has_room`: whether the
    nodes could hold one more replica than now serve, if the applications that it replaces were gone.
    """

    model: str
    digest: str
    replicas: int
    version: str = "v1"
    ray: str = "local"
    stale: bool = False
    gpu: str = ""
    has_room: bool = True

    @property
    def app(self) -> str:
        """Name of the application on Ray, without the name of the Ray cluster."""
        return app_name(self.model, self.version, self.digest)


@dataclass(frozen=True, slots=True)
class Deploy:
    """Step that creates an application, or deploys the application again."""

    app: str
    why: str
    ray: str = "local"


@dataclass(frozen=True, slots=True)
class Scale:
    """Step that changes the number of replicas of an application. The remaining replicas are not touched."""

    app: str
    replicas: int
    ray: str = "local"


@dataclass(frozen=True, slots=True)
class Delete:
    """Step that removes an application. The replicas of the application drain."""

    app: str
    ray: str = "local"


Action = Deploy | Scale | Delete


@dataclass(frozen=True, slots=True)
class Plan:
    """Result of a reconciliation.

    `actions` are the steps to run now. `retired` applications get no new calls and are deleted later.
    """

    actions: tuple[Action, ...]
    retired: frozenset[str] = frozenset()


def reconcile(
    wanted: Sequence[Wanted],
    observed: Mapping[str, Observed],
    now_s: float,
    *,
    empty: Container[str] = (),
    frozen: Container[str] = (),
    dropped: Container[tuple[str, str]] = (),
) -> Plan:
    """Plan the next steps. The plan has no steps if everything is as wanted.

    Applications of versions that are no longer wanted are replaced by the first wanted application of their model.
    `empty`: applications that may be deleted, because they have no call left or their drain time is over. `frozen`:
    models for which nothing new is started and nothing is replaced. `dropped`: (model, version) pairs that get no
    calls; their applications are retired at once. `now_s` is wall-clock time, like the `deployed_at_s` of Ray.
    """
    actions: list[Action] = []
    retired: set[str] = set()
    apps = {want.app for want in wanted}
    for old in observed.values():
        if old.app in apps or old.deleting:
            continue
        heirs = [want for want in wanted if want.model == old.model]
        if heirs and old.model in frozen:
            continue
        waited_for = [want for want in _heirs(old, heirs) if not _serves_as_many(want, observed.get(want.app))]
        if not waited_for or (old.model, old.version) in dropped:
            retired.add(old.app)
            if old.app in empty:
                actions.append(Delete(old.app, old.ray))
        elif (replicas := _makes_room(waited_for[0], observed.get(waited_for[0].app), old, now_s)) != old.target:
            actions.append(Scale(old.app, replicas, old.ray))
    for want in wanted:
        there = any(app.model == want.model and not app.deleting for app in observed.values())
        action = _step(want, observed.get(want.app), now_s, begins=want.model not in frozen or not there)
        if action is not None:
            actions.append(action)
    return Plan(tuple(sorted(actions, key=lambda action: not isinstance(action, Delete))), frozenset(retired))


def _heirs(old: Observed, wanted: Sequence[Wanted]) -> Sequence[Wanted]:
    """Return the applications that replace the application `old`. `wanted`: the wanted applications of the same model.

    The replacements have the version of `old`. If no wanted application has this version, they have the version of the
    first wanted application. If some applications with this version have replicas on the GPU type of `old`, only these
    are returned; otherwise all applications with this version are returned.
    """
    versions = [want.version for want in wanted]
    version = old.version if old.version in versions else next(iter(versions), "")
    mine = [want for want in wanted if want.version == version]
    return [want for want in mine if want.gpu == old.gpu and want.replicas] or mine


def _serves_as_many(heir: Wanted, seen: Observed | None) -> bool:
    """Return whether the new application `heir` runs all replicas that it should have, so that the old
    application can be deleted.

    `seen`: the state of `heir` on Ray; None if `heir` is not there. The number of replicas of the old
    application does not matter, because it may have given up replicas to make room.
    """
    return seen is not None and not seen.deleting and seen.running >= heir.replicas


def _makes_room(heir: Wanted, seen: Observed | None, old: Observed, now_s: float) -> int:
    """Return the number of replicas that the application `old` should have until its replacement `heir` serves.

    `old` gives up one replica at a time while Ray has no room for a replica of `heir`.
    """
    if seen is None or seen.deleting or not seen.digest or old.ray != heir.ray:
        return old.target
    if seen.failed or (not heir.has_room and not seen.running):
        return heir.replicas  # the old application keeps serving, with the wanted number of replicas
    if seen.trouble or not heir.has_room:
        return old.target
    waits = seen.running < seen.target and not seen.placed and now_s - seen.deployed_at_s >= SURGE_WAIT_S
    return old.target - 1 if waits and old.target > 0 and not old.leaving else old.target


def _step(want: Wanted, seen: Observed | None, now_s: float, *, begins: bool) -> Action | None:
    if seen is None:
        return Deploy(want.app, "new", want.ray) if begins else None
    if seen.deleting or (not seen.digest and now_s - seen.deployed_at_s < SETTLE_S):
        return None
    if not seen.digest:
        return Deploy(want.app, "unseen", want.ray)
    if want.stale and begins and now_s - seen.deployed_at_s >= SETTLE_S:
        return Deploy(want.app, "other weights", want.ray)
    if seen.gave_up and not seen.refused and not seen.running and now_s - seen.deployed_at_s >= RETRY_S:
        return Deploy(want.app, "retry", want.ray)
    if seen.target != want.replicas:
        return Scale(want.app, want.replicas, want.ray)
    return None
