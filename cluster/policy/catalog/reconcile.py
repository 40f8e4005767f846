"""Reconciliation of wanted and observed applications on Ray: the next steps. Pure.

Problem: Ray Serve restarts every replica of an application that is deployed again, changed or not; and a model's
replicas must be replaced under load without ending a call.

Invariants: only the number of replicas of an application is ever changed. Its name holds all that it was started with
(`model@version+digest`), so a changed entry becomes another application beside the first. The first stays until the
other one serves with as many replicas, then gets no new calls, and is deleted once it is empty or its drain time is
over. If both do not fit, the first gives up one replica at a time, and only while Ray cannot place the other's. An
application that cannot start displaces nothing.

Steps are listed in the order in which to do them: those that free GPUs come first.
"""

from __future__ import annotations

import re
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass

RETRY_S = 60.0
"""Pause before a failed application is deployed again. One that Ray refused needs a changed entry."""
SETTLE_S = 30.0
"""Time for which a deployed application may show nothing on Ray before it is deployed again."""
SURGE_WAIT_S = 20.0
"""Time for which a new application waits for capacity beside the one it replaces before the old one makes room."""

_APP = re.compile(r"(?P<model>[^@]+)@(?P<version>[^+]+)\+(?P<digest>[0-9a-f]+)")


def app_name(model: str, version: str, digest: str) -> str:
    """Name of the application that runs this; equal only for equal replicas."""
    return f"{model}@{version}+{digest}"


def app_parts(app: str) -> tuple[str, str, str]:
    """Inverse of `app_name`: model, version and digest. A name of another form is returned as the model."""
    match = _APP.fullmatch(app)
    return (match["model"], match["version"], match["digest"]) if match else (app, "", "")


@dataclass(frozen=True, slots=True)
class Observed:
    """One of our applications on Ray. Counts are of replicas; `trouble` is why the last start failed, if it did.

    `digest` is "" for the moment between the deployment and Ray showing the application.
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
    """Its name on Ray where that differs from `app_name` of the other fields."""
    gpu: str = ""
    """GPU type that it was made for; "" if any or unknown."""

    @property
    def app(self) -> str:
        """Name on Ray, without the Ray cluster's."""
        return self.named or app_name(self.model, self.version, self.digest)

    @property
    def failed(self) -> bool:
        """Whether it serves no calls and cannot recover by itself."""
        return not self.running and (self.gave_up or self.refused)


@dataclass(frozen=True, slots=True)
class Wanted:
    """An application that should run: the digest of all that its replicas are started with, and their number.

    `stale`: its replicas have other weights than the entry now asks for, so they must be restarted.
    """

    model: str
    digest: str
    replicas: int
    version: str = "v1"
    ray: str = "local"
    stale: bool = False
    gpu: str = ""

    @property
    def app(self) -> str:
        """Name on Ray, without the Ray cluster's."""
        return app_name(self.model, self.version, self.digest)


@dataclass(frozen=True, slots=True)
class Deploy:
    """Create an application, or deploy it again."""

    app: str
    why: str
    ray: str = "local"


@dataclass(frozen=True, slots=True)
class Scale:
    """Change the number of replicas; the remaining ones are not touched."""

    app: str
    replicas: int
    ray: str = "local"


@dataclass(frozen=True, slots=True)
class Delete:
    """Remove an application; its replicas drain."""

    app: str
    ray: str = "local"


Action = Deploy | Scale | Delete


@dataclass(frozen=True, slots=True)
class Plan:
    """`actions` to do now, and the `retired` applications: these get no new calls, so that they can be deleted."""

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
    """Plan the next steps; there are none if all is as wanted.

    The first wanted application of a model replaces versions that are no longer wanted. `empty`: applications without a
    call, or whose drain time is over. `frozen`: models of which nothing new is started and nothing is replaced.
    `dropped`: (model, version) pairs that are retired at once, because they get no calls. `now_s` is wall-clock time,
    as Ray's `deployed_at_s`.
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
    """Wanted applications of the same model that replace `old`.

    Those of its version, else of the first version; of these the one of its GPU type, if that is to have replicas.
    """
    versions = [want.version for want in wanted]
    version = old.version if old.version in versions else next(iter(versions), "")
    mine = [want for want in wanted if want.version == version]
    return [want for want in mine if want.gpu == old.gpu and want.replicas] or mine


def _serves_as_many(heir: Wanted, seen: Observed | None) -> bool:
    """Whether the old application is no longer needed.

    Its own replica count is not compared, because it may have given replicas up to make room.
    """
    return seen is not None and not seen.deleting and seen.running >= heir.replicas


def _makes_room(heir: Wanted, seen: Observed | None, old: Observed, now_s: float) -> int:
    """Replicas that the old application keeps while the new one is not up."""
    if seen is None or seen.deleting or not seen.digest or old.ray != heir.ray:
        return old.target
    if seen.failed:
        return heir.replicas  # the old application keeps serving, with the wanted number of replicas
    if seen.trouble:
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
