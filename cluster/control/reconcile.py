"""What is wanted against what is there, and the steps between them. Pure.

An application is touched only when its own digest differs, since Ray Serve restarts every replica of what it is
given, changed or not. Steps come in the order in which they are to be done: what is to go first, so that it frees its
GPUs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

RETRY_S = 60.0
"""Pause before what Ray gave up on is deployed anew, unless it was refused: then only a changed entry helps."""
SETTLE_S = 30.0
"""How long an application may show nothing of itself before it counts as changed."""


@dataclass(frozen=True, slots=True)
class Observed:
    """A model's application on Ray. Counts are of replicas; `trouble` is why the last start failed, if it did.

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


@dataclass(frozen=True, slots=True)
class Wanted:
    """A model that is to run: the digest of all that its replicas are started with, and how many."""

    model: str
    digest: str
    replicas: int


@dataclass(frozen=True, slots=True)
class Deploy:
    """Make, or make anew, the model's application."""

    model: str
    why: str


@dataclass(frozen=True, slots=True)
class Scale:
    """Change the number of replicas and touch no other."""

    model: str
    replicas: int


@dataclass(frozen=True, slots=True)
class Delete:
    """Drain and remove the model's application."""

    model: str


Action = Deploy | Scale | Delete


def reconcile(wanted: Sequence[Wanted], observed: Mapping[str, Observed], now_s: float) -> tuple[Action, ...]:
    """The next steps; none when all is as wanted. `now_s` is wall-clock time, as Ray's `deployed_at_s`."""
    names = {w.model for w in wanted}
    actions: list[Action] = [Delete(o.model) for o in observed.values() if o.model not in names and not o.deleting]
    for want in wanted:
        action = _step(want, observed.get(want.model), now_s)
        if action is not None:
            actions.append(action)
    return tuple(actions)


def _step(want: Wanted, seen: Observed | None, now_s: float) -> Action | None:
    if seen is None:
        return Deploy(want.model, "new")
    if seen.deleting or (not seen.digest and now_s - seen.deployed_at_s < SETTLE_S):
        return None
    if seen.digest != want.digest:
        return Deploy(want.model, "changed")
    if seen.gave_up and not seen.refused and not seen.running and now_s - seen.deployed_at_s >= RETRY_S:
        return Deploy(want.model, "retry")
    if seen.target != want.replicas:
        return Scale(want.model, want.replicas)
    return None
