"""What is wanted against what is there, and the steps between them. Pure.

Problem: Ray Serve restarts every replica of an application that it is given anew, changed or not; and a model's
replicas must be changed under load without ending a call.
Invariants: an application is never changed but in its number of replicas. What it was started with is in its name
(`model@version+digest`), so a changed entry is another application, beside the first. The first stays until the other
serves as many, then gets no new call, and goes when none is left there (or its time to drain is over). Where both do
not fit, the first gives up one replica at a time, and only while Ray has nowhere to put the other's. An application
that cannot come up displaces nothing.
Steps come in the order in which they are to be done: what frees GPUs first.
"""

from __future__ import annotations

import re
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass

RETRY_S = 60.0
"""Pause before what Ray gave up on is deployed anew, unless it was refused: then only a changed entry helps."""
SETTLE_S = 30.0
"""How long an application may show nothing of itself before it is made anew."""
SURGE_WAIT_S = 20.0
"""How long a new application may wait for room beside the one that it replaces before that one makes room."""

_APP = re.compile(r"(?P<model>[^@]+)@(?P<version>[^+]+)\+(?P<digest>[0-9a-f]+)")


def app_name(model: str, version: str, digest: str) -> str:
    """The name of the application that runs this: equal only for equal replicas."""
    return f"{model}@{version}+{digest}"


def app_parts(app: str) -> tuple[str, str, str]:
    """Model, version and digest of `app_name`; one that was named otherwise is a model's without either."""
    found = _APP.fullmatch(app)
    return (found["model"], found["version"], found["digest"]) if found else (app, "", "")


@dataclass(frozen=True, slots=True)
class Observed:
    """An application of ours on Ray. Counts are of replicas; `trouble` is why the last start failed, if it did.

    `digest` is "" for the moment between Ray taking an application and showing what it is.
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
    """Its name on Ray where that is not `app_name` of the rest."""
    gpu: str = ""
    """The type that it was made for; "" for any, or where nobody has said."""

    @property
    def app(self) -> str:
        """Its name on Ray, without the cluster's."""
        return self.named or app_name(self.model, self.version, self.digest)

    @property
    def failed(self) -> bool:
        """Whether it can be expected to serve nobody as it stands."""
        return not self.running and (self.gave_up or self.refused)


@dataclass(frozen=True, slots=True)
class Wanted:
    """An application that is to run: the digest of all that its replicas are started with, and how many.

    `stale`: its replicas have other weights than they are to have now, so they are to be started again.
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
        """Its name on Ray, without the cluster's."""
        return app_name(self.model, self.version, self.digest)


@dataclass(frozen=True, slots=True)
class Deploy:
    """Make an application, or make it anew."""

    app: str
    why: str
    ray: str = "local"


@dataclass(frozen=True, slots=True)
class Scale:
    """Change the number of replicas and touch no other."""

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
    """`actions` now, and the applications that are to get no new calls, so that they can go."""

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
    """The next steps; none when all is as wanted. The first wanted of a model is the one that stands in for versions
    that are wanted no more. `empty`: applications without a call, or whose time to drain is over. `frozen`: models of
    which nothing new is begun and nothing is replaced. `dropped`: versions of models that go at once, since they get no
    calls. `now_s` is wall-clock time, as Ray's `deployed_at_s`."""
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
        there = any(one.model == want.model and not one.deleting for one in observed.values())
        action = _step(want, observed.get(want.app), now_s, begins=want.model not in frozen or not there)
        if action is not None:
            actions.append(action)
    return Plan(tuple(sorted(actions, key=lambda one: not isinstance(one, Delete))), frozenset(retired))


def _heirs(old: Observed, wanted: Sequence[Wanted]) -> Sequence[Wanted]:
    """Which of its model's take its place: those of its version, else those of the first, and of these the one of its
    type of GPU where that is to have replicas."""
    versions = [want.version for want in wanted]
    version = old.version if old.version in versions else next(iter(versions), "")
    mine = [want for want in wanted if want.version == version]
    return [want for want in mine if want.gpu == old.gpu and want.replicas] or mine


def _serves_as_many(heir: Wanted, seen: Observed | None) -> bool:
    """Whether nobody needs the old one any longer. It is not asked how many that has: it may have made room."""
    return seen is not None and not seen.deleting and seen.running >= heir.replicas


def _makes_room(heir: Wanted, seen: Observed | None, old: Observed, now_s: float) -> int:
    """How many replicas of the old one are to run while the new one is not up."""
    if seen is None or seen.deleting or not seen.digest or old.ray != heir.ray:
        return old.target
    if seen.failed:
        return heir.replicas  # the old one goes on in its place, with as many as there are to be
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
