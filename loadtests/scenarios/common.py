"""Parts that scenarios share: options, rounds in which the arms (measured servers) alternate, and the cores that
processes are bound to.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from loadtests.children import Children
from loadtests.driver import Limits, drive
from loadtests.faces.base import CallFailed, Face, Request
from loadtests.figures import MIN_ROUNDS
from loadtests.processes import pin_driver, snapshot, usage_between
from loadtests.records import Run, same_texts
from loadtests.report import Arm, Report, Round
from loadtests.show import Screen
from loadtests.sim.adapters import AdapterMix

PEERS = Path(__file__).resolve().parent.parent.parent / ".venv-peers"
FIRST_CALL_S = 60.0
AVAILABLE = sorted(os.sched_getaffinity(0))
"""Cores of this process before the process binds itself to some of these cores."""


@dataclass(frozen=True, slots=True)
class Setup:
    """Model and hardware for the scenario `peers`, in place of the tiny model."""

    model: Path | None
    """Folder of a checkpoint; None for the tiny model."""
    engine: Mapping[str, object]
    gpus: int
    """Number of GPUs of one engine."""
    exact: bool = False
    """Whether the arithmetic is the same in every batch, so that equal requests must give equal texts."""


@dataclass(frozen=True, slots=True)
class Options:
    """Options from the command line. `rounds` and `tokens` are None if the scenario is to use its own numbers."""

    rounds: int | None = None
    tokens: int | None = None
    concurrency: int | None = None
    seed: int = 1
    pin: bool = True
    only: tuple[str, ...] = ()
    """Names of the arms to run; empty for all arms."""
    peers: Path = PEERS
    setup: Setup | None = None
    """For `peers`: model and hardware. If None, the tiny model is used, and then the rows without an engine follow."""
    points: int | None = None
    """For `faults`: number of faults."""
    runner: str = "v1"
    """For `faults` and `adapters`: the model runner of the real engines."""
    soak_s: float | None = None
    """For `faults`: duration of the soak, in seconds."""
    speed: float | None = None
    """For `hosts`: factor by which the streams are shorter."""
    against: Path | None = None
    """For `hostile`: the checkout with which the cost per token is compared."""
    adapters: float | None = None
    """For `fairness`, `routing` and `peers`: share of the calls that name an adapter."""
    cases: int | None = None
    """For `agents`: number of cases of BFCL."""
    clients: tuple[str, ...] = ()
    """For `agents`: names of the clients to run; empty for all."""
    ends_at: float | None = None
    """Value of time.monotonic after which no round begins."""

    @property
    def adapter_mix(self) -> AdapterMix | None:
        """The adapters that simulated calls name, and the share of the calls that name one. None if no call names an
        adapter."""
        return None if self.adapters is None else AdapterMix(self.adapters)

    known: set[str] = field(default_factory=set, compare=False)
    """Names for which `selects` was called."""

    def selects(self, arm: str) -> bool:
        """Return whether an arm (a measured server) or a part of the scenario is to run."""
        self.known.add(arm)
        return not self.only or arm in self.only

    def unknown(self) -> str:
        """Return an error for selected names that the scenario does not have; empty if it has all of them. Call it
        after the scenario."""
        wrong = sorted(set(self.only) - self.known)
        return f"--only {', '.join(wrong)}: there are {', '.join(sorted(self.known))}" if wrong else ""


@dataclass(frozen=True, slots=True)
class Stage:
    """The context of a running scenario."""

    options: Options
    screen: Screen
    children: Children
    folder: Path
    report: Report
    part: str = ""
    """Prefix of the names of arms when a scenario runs as a part of another scenario."""

    def arm(self, name: str, description: str) -> Arm:
        """Add an arm to the report and return it."""
        return self.report.arm(self.part + name, description)

    def with_share_of_time(self, share: float) -> Stage:
        """Return this stage with `share` of the remaining time. If the time is not bounded, return the stage itself."""
        ends_at, now = self.options.ends_at, time.monotonic()
        if ends_at is None:
            return self
        return replace(self, options=replace(self.options, ends_at=now + max(ends_at - now, 0.0) * share))


@dataclass(eq=False, slots=True)
class Contestant:
    """An arm (a server, measured over one protocol) with its client and its processes. `after`: called after a run,
    returns values of this run that only the server knows."""

    arm: Arm
    face: Face
    roots: Sequence[tuple[int, str]]
    after: Callable[[Run], Awaitable[dict[str, Any]]] | None = None
    runs: list[Run] = field(default_factory=list)


async def first_call(contestant: Contestant, request: Request, timeout_s: float = FIRST_CALL_S) -> bool:
    """Repeat `request` until the contestant answers; return whether it answers within `timeout_s`.

    Without an answer, the problem is recorded in `contestant.arm`.
    """
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            await asyncio.wait_for(contestant.face.run(request, lambda text: None), max(deadline - time.monotonic(), 1))
            return True
        except (CallFailed, TimeoutError) as error:
            if time.monotonic() > deadline:
                contestant.arm.problem = f"no answer within {timeout_s:g} s: {error}"
                return False
            await asyncio.sleep(0.2)


async def run_round(
    contestant: Contestant,
    screen: Screen,
    number: int,
    requests: Sequence[Request],
    *,
    concurrency: int | None = None,
    due_s: Sequence[float] | None = None,
    limits: Limits | None = None,
    keep: bool = True,
) -> Run:
    """Send the requests to a contestant (a measured server) and return the run. Unless `keep` is False (a warm-up),
    the run is recorded as a round of the contestant, with the CPU time of the server's processes.

    `number`: number of the round.
    """
    title = f"{contestant.arm.name}, round {number}" if keep else f"{contestant.arm.name}, warm-up"
    before = snapshot(contestant.roots)
    async with screen.running(title) as on_start:
        run = await drive(
            contestant.face, requests, concurrency=concurrency, due_s=due_s, limits=limits, on_start=on_start
        )
    usage = usage_between(before, snapshot(contestant.roots))
    if keep:
        extra: dict[str, Any] = {"concurrency": concurrency} if concurrency else {}
        if contestant.after is not None:
            extra |= await contestant.after(run)
        contestant.arm.rounds.append(Round(number, run, usage, extra))
        contestant.runs.append(run)
    if run.problem:
        contestant.arm.problem = f"round {number}: {run.problem}"
    return run


async def alternate(
    stage: Stage,
    contestants: Sequence[Contestant],
    requests_of: Callable[[int], Sequence[Request]],
    *,
    rounds: int,
    concurrency: int,
    limits: Limits | None = None,
    cooldown_s: float = 0.0,
    first_number: int = 1,
    check: bool = True,
    share_engines: bool = False,
) -> None:
    """Warm up each contestant (a server to measure), then run all contestants in turn, `rounds` times.

    All contestants of a round get the same requests. A broken contestant is skipped. Every second round has the
    opposite order, so that a contestant does not run after the same other contestant in every round.

    `cooldown_s`: pause after each run, in which the processes finish the work that follows their last call.
    `first_number`: number of the first round. `check`: whether to check the answers after the last round.
    `share_engines`: whether several contestants run on one engine. Then the prompts of each begin with a number of its
    own, so that it does not find in the prefix cache what another one has computed in this round. Only the answers of
    the warm-up are compared.
    """
    warm_ups: list[list[Run]] = []
    for contestant in contestants:
        run = await run_round(
            contestant, stage.screen, 0, requests_of(0), concurrency=concurrency, limits=limits, keep=False
        )
        warm_ups.append([run])
    numbers = {id(contestant): number for number, contestant in enumerate(contestants)}
    for number in range(first_number, first_number + rounds):
        if stage.options.ends_at is not None and time.monotonic() > stage.options.ends_at:
            done = f"{number - first_number} of {rounds}"
            stage.report.settings.setdefault("rounds cut short", []).append(f"{done}: time was up")
            break
        requests = requests_of(number)
        for contestant in contestants if number % 2 else reversed(contestants):
            if not contestant.arm.problem:
                asked = _apart(requests, numbers[id(contestant)]) if share_engines else requests
                await run_round(contestant, stage.screen, number, asked, concurrency=concurrency, limits=limits)
                await asyncio.sleep(cooldown_s)
    setup = stage.options.setup
    if check:
        exact = setup is None or setup.exact
        check_answers(stage.report, contestants, exact=exact, compared=warm_ups if share_engines else None)


def _apart(requests: Sequence[Request], number: int) -> Sequence[Request]:
    """Return the requests with other beginnings, which no other contestant has. `number`: the contestant's number."""
    return [
        replace(request, key=f"{request.key}/{number}", prompt=f"{number} {request.prompt}") for request in requests
    ]


def check_answers(
    report: Report,
    contestants: Sequence[Contestant],
    *,
    exact: bool = True,
    compared: Sequence[Sequence[Run]] | None = None,
) -> None:
    """Check that every answer has the requested number of tokens, and that all arms (measured servers) gave the same
    text for the same request. Failed checks are added to the report's problems.

    If `exact` is False, texts that differ between arms are counted, but are not added to the problems. `compared`: the
    runs of each contestant whose texts are compared; None for its rounds.
    """
    for contestant in contestants:
        short = sum(1 for run in contestant.runs for r in run.good if r.tokens != r.asked_tokens)
        if short:
            report.problems.append(f"{contestant.arm.name}: {short} answers do not have the requested number of tokens")
    texts = [contestant.runs for contestant in contestants] if compared is None else compared
    ran = [(contestant.arm.name, runs) for contestant, runs in zip(contestants, texts, strict=True) if contestant.runs]
    for name, runs in ran[1:]:
        reference, expected = ran[0]
        pairs = [same_texts(a, b) for a, b in zip(expected, runs, strict=False)]
        equal, count = sum(e for e, _ in pairs), sum(c for _, c in pairs)
        report.settings[f"equal texts: {name} and {reference}"] = f"{equal} of {count}"
        if exact and equal != count:
            report.problems.append(f"{name} and {reference} gave different texts in {count - equal} of {count}")


def per_round(
    one: Contestant | None, other: Contestant | None, value: Callable[[Round], float | None]
) -> tuple[list[float], list[float]]:
    """Return two lists of equal length: the values of the server `one` and of the server `other`. Rounds in which
    either has no value are left out."""
    if one is None or other is None:
        return [], []
    theirs = {r.number: value(r) for r in other.arm.rounds}
    pairs = [(value(r), theirs.get(r.number)) for r in one.arm.rounds]
    whole = [(a, b) for a, b in pairs if a is not None and b is not None and a > 0 and b > 0]
    return [a for a, _ in whole], [b for _, b in whole]


def rounds_of(options: Options) -> int:
    """Return the requested number of rounds. If none is requested, return MIN_ROUNDS, the number that is needed to
    judge a bound."""
    return options.rounds or MIN_ROUNDS


def unbind() -> None:
    """Bind this process to all its original cores again. Processes that this process starts inherit the binding."""
    pin_driver(AVAILABLE)


def cores(bound: bool) -> tuple[list[int], list[int], list[int]] | None:
    """Return the cores for the measured processes, for engines, and for the driver; None if no
    process is to be bound.
    """
    there = AVAILABLE
    if not bound or len(there) < 2:
        return None
    if len(there) < 4:
        return there[:1], there[1:], there[1:]
    return there[:1], there[1:-1], there[-1:]
