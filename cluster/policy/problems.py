"""Problems: the faults that a cluster reports of itself, each kind declared once.

Problem: a fault that only a log line or a metric without an alert shows is found by callers first.

Method: KINDS has for each kind whom it hurts, its text, what helps, and its alert. Gateways and the controller search
for present faults every few seconds. A ProblemList remembers since when each is present, and lists it once it has
lasted for its kind's `after_s`, which is longer than restarts and rollouts take.

Invariants: what is found in each search is listed after `after_s`, and no longer once a search does not find it. The
order is: problems that hurt callers, then the others, each the oldest first. At most MAX_PROBLEMS are listed.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Self

MAX_PROBLEMS: Final = 200
MAX_CAUSE_CHARS: Final = 500
MAX_OBJECT_CHARS: Final = 200
ANY_ALERT: Final = "HeadraceProblem"
"""Alert of all kinds without an alert of their own."""


class Hurts(enum.StrEnum):
    """The people who notice a problem that stays."""

    CALLERS = "callers"
    OPERATORS = "operators"


@dataclass(frozen=True, slots=True)
class ProblemKind:
    """A kind of problem. `summary`: its text, with the `{object}` that has it. `remedy`: what to do first. `alert`: the
    alert that it raises, after which its runbook is named; "" for ANY_ALERT."""

    hurts: Hurts
    summary: str
    remedy: str
    alert: str = ""
    after_s: float = 0.0


KINDS: Final[Mapping[str, ProblemKind]] = {
    "model_failed": ProblemKind(
        Hurts.CALLERS,
        "model {object} cannot start",
        "correct the model's entry or its files; `headrace models describe NAME` shows each version",
        "HeadraceModelFailed",
    ),
    "model_without_workers": ProblemKind(
        Hurts.CALLERS,
        "model {object} has lost its last worker",
        "`headrace workers` and the log of the replica say why; calls wait for the next worker",
        "HeadraceModelWithoutWorkers",
        after_s=5.0,
    ),
    "workers_crash": ProblemKind(
        Hurts.CALLERS,
        "workers of model {object} end again and again",
        "see why they ended in `headrace status`; cordon the node if all were on one",
        "HeadraceWorkersLost",
    ),
    "failing_calls": ProblemKind(
        Hurts.CALLERS,
        "calls to model {object} fail",
        "`headrace traces --errors` and `headrace explain request ID` show where",
        "HeadraceErrorBudgetBurnsFast",
    ),
    "slow_calls": ProblemKind(
        Hurts.CALLERS,
        "calls to model {object} miss the model's SLO",
        "`headrace slo` and `headrace explain scaling NAME` show what is short",
        "HeadraceLatencyBudgetBurnsFast",
    ),
    "adapter_failed": ProblemKind(
        Hurts.CALLERS,
        "adapter {object} is loaded on no worker",
        "`headrace adapters list` has the reason of each worker",
        "HeadraceAdapterFailed",
        after_s=5.0,
    ),
    "certificate_expired": ProblemKind(
        Hurts.CALLERS,
        "the certificate in {object} has expired",
        "renew it: the file is read again, nothing restarts",
        "HeadraceCertificateExpires",
    ),
    "guard_fails": ProblemKind(
        Hurts.CALLERS,
        "guard {object} fails",
        "its service does not answer; calls are refused or unchecked, as the guard is configured",
        "HeadraceGuardFails",
    ),
    "gateway_late": ProblemKind(
        Hurts.CALLERS,
        "gateway {object} runs late",
        "its core is busy: add gateway processes, or find what else uses the host",
        "HeadraceGatewayLate",
        after_s=5.0,
    ),
    "gateway_gone": ProblemKind(
        Hurts.OPERATORS,
        "gateway {object} has gone without a word, or is frozen",
        "restart it; callers use the other gateways meanwhile",
        "HeadraceGatewayGone",
    ),
    "database_away": ProblemKind(
        Hurts.OPERATORS,
        "the database of gateway {object} does not answer",
        "bring it back: usage waits in each gateway's spool, new keys are unknown until then",
        "HeadraceDatabaseAway",
        after_s=2.0,
    ),
    "spool_not_written": ProblemKind(
        Hurts.OPERATORS,
        "gateway {object} cannot write usage records to its disk",
        "free the volume of the gateway's folder: records wait in memory and are lost with the process",
        "HeadraceSpoolNotWritten",
        after_s=2.0,
    ),
    "disk_nearly_full": ProblemKind(
        Hurts.OPERATORS,
        "the disk of {object} is nearly full",
        "free it: spool, audit log and prompt log stop when it is full",
    ),
    "limits_store_away": ProblemKind(
        Hurts.OPERATORS,
        "the limits store of gateway {object} does not answer",
        "bring Valkey back: each gateway keeps to its share of every limit meanwhile",
        "HeadraceLimitsDegraded",
        after_s=2.0,
    ),
    "config_refused": ProblemKind(
        Hurts.OPERATORS,
        "the configuration file of gateway {object} is not valid",
        "correct it with `headrace config check FILE` before a gateway restarts",
        "HeadraceConfigRefused",
    ),
    "certificate_expires": ProblemKind(
        Hurts.OPERATORS,
        "the certificate in {object} expires soon",
        "renew it: the file is read again, nothing restarts",
        "HeadraceCertificateExpiresSoon",
    ),
    "controller_away": ProblemKind(
        Hurts.OPERATORS,
        "no controller speaks to gateway {object}",
        "start the controller: models are served, but not scaled, and lost replicas only replaced by Ray",
        "HeadraceControllerAway",
    ),
    "ray_away": ProblemKind(
        Hurts.OPERATORS,
        "Ray cluster {object} does not answer",
        "bring its head back: running workers serve on, none is started or replaced",
        "HeadraceRayAway",
        after_s=2.0,
    ),
    "model_held": ProblemKind(
        Hurts.OPERATORS,
        "the entry of model {object} is not valid, so its replicas stay as they are",
        "correct the entry in the controller's file; `headrace config check FILE` names the error",
    ),
    "no_capacity": ProblemKind(
        Hurts.OPERATORS,
        "model {object} cannot get the replicas that it wants",
        "`headrace explain scaling NAME` says what is missing: add nodes, or lower `replicas`",
        "HeadraceFewerReplicas",
        after_s=5.0,
    ),
    "version_quarantined": ProblemKind(
        Hurts.OPERATORS,
        "version {object} gets no calls",
        "`headrace models describe NAME` says why it was stopped; remove it or roll it out anew",
        "HeadraceCanaryTakenBack",
    ),
    "worker_lost": ProblemKind(
        Hurts.OPERATORS,
        "worker {object} was lost within the last minute",
        "its calls were resumed; the cause says how its engine ended",
        "HeadraceWorkersLost",
    ),
    "clock_wrong": ProblemKind(
        Hurts.OPERATORS,
        "the clock of gateway {object} differs from the controller's",
        "synchronize both hosts: limits a minute, tokens and usage times are wrong",
        after_s=5.0,
    ),
}
"""All kinds, the more urgent first. docs/reference/problems.md is written from this table."""


@dataclass(frozen=True, slots=True)
class Finding:
    """A fault that a search has found. `object`: the model, worker, file or process that has it. `cause`: why, in a
    sentence."""

    kind: str
    object: str
    cause: str = ""


@dataclass(frozen=True, slots=True)
class Problem:
    """A listed problem. `since_s`: when it was first found, in seconds since the epoch."""

    kind: str
    object: str
    cause: str
    since_s: float

    @classmethod
    def of(cls, finding: Finding, since_s: float) -> Self:
        """Return the problem of a finding, with its texts cut to their bounds."""
        return cls(finding.kind, finding.object[:MAX_OBJECT_CHARS], finding.cause[:MAX_CAUSE_CHARS], since_s)

    @property
    def row(self) -> dict[str, Any]:
        """The problem as people and programs see it: a row of the overview."""
        kind = KINDS[self.kind]
        return {
            "id": f"{self.kind}:{self.object}",
            "kind": self.kind,
            "object": self.object,
            "hurts": kind.hurts.value,
            "summary": kind.summary.format(object=self.object),
            "cause": self.cause,
            "since_s": round(self.since_s, 1),
            "remedy": kind.remedy,
            "runbook": kind.alert or ANY_ALERT,
        }


class ProblemList:
    """The present problems of one process."""

    def __init__(self) -> None:
        self._since: dict[tuple[str, str], float] = {}
        self.current: Sequence[Problem] = ()

    def update(self, findings: Iterable[Finding], now_s: float) -> None:
        """Replace the problems by those of a new search. `now_s`: seconds since the epoch."""
        found = {(finding.kind, finding.object): finding for finding in findings}
        self._since = {key: min(self._since.get(key, now_s), now_s) for key in found}
        self.current = ordered(
            Problem.of(finding, self._since[key])
            for key, finding in found.items()
            if now_s - self._since[key] >= KINDS[finding.kind].after_s
        )


def ordered(problems: Iterable[Problem]) -> Sequence[Problem]:
    """Return problems, of which the same one may come from several processes, in the order in which they are listed."""
    first: dict[tuple[str, str], Problem] = {}
    for problem in problems:
        known = first.get((problem.kind, problem.object))
        if problem.kind in KINDS and (known is None or problem.since_s < known.since_s):
            first[problem.kind, problem.object] = problem
    rank = {kind: at for at, kind in enumerate(KINDS)}
    by_urgency = sorted(
        first.values(), key=lambda one: (KINDS[one.kind].hurts is not Hurts.CALLERS, one.since_s, rank[one.kind])
    )
    return by_urgency[:MAX_PROBLEMS]
