"""Faults: what callers see while workers are killed, stopped and cut off, and what the gateway does under overload.

Parts, each with its rows, in the order of the table: mass (kill points under every kind of call), engines (the same on
real vLLM), recovery (silent gaps, detection, the survivors), alarms, overload, soak; the ledger is looked at after
each. `--only PART` runs some of them; `--points`, `--soak-s` and `--rounds` size them.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from loadtests.faults import mass
from loadtests.faults.ledger import Books, audit
from loadtests.figures import Bound, Figure, missing
from loadtests.scenarios.common import Stage
from loadtests.serving import fleet
from loadtests.serving import ours as serving

POINTS, ENGINE_POINTS = 1000, 40
NOT_ASKED = "not asked for (--only)"
EXACT = "calls under random faults that end with exactly the undisturbed answer"
DUPLICATES, GAPS = "such calls that told something twice", "such calls with something missing"
BOOKS = "calls missing or doubled in the ledger, over all parts"
_ALL, _NONE = Bound(">=", 1.0), Bound("<=", 0.0)


@dataclass(slots=True)
class Field:
    """What the parts share."""

    stage: Stage
    model: Path
    bundle: Path
    books: Books = field(default_factory=lambda: Books(0, 0, 0, 0))


def exact(name: str, value: float, bound: Bound, unit: str, note: str = "") -> Figure:
    """A row that is counted, not estimated: every case is in it."""
    met = value >= bound.limit if bound.sense == ">=" else value <= bound.limit
    return Figure(name, value=value, bound=str(bound), met=met, unit=unit, note=note)


async def play(stage: Stage) -> None:
    """The parts that are wanted, and their rows in the table's order."""
    model, bundle = await serving.prepare(stage.children, "tokenizer", stage.folder)
    field = Field(stage, model, bundle)
    for name, (part, rows) in PARTS.items():
        if stage.options.wants(name):
            stage.screen.say(f"part {name}")
            stage.report.figures += await part(field)
        else:
            stage.report.figures += [missing(row, bound, NOT_ASKED) for row, bound in rows.items()]
    books = field.books
    note = f"{books.sequences} answered sequences; {books.miscounted} calls with other token counts than told"
    stage.report.settings["ledger"] = note
    if books.sequences:
        stage.report.figures.append(exact(BOOKS, books.wrong, _NONE, "calls", note))
    else:
        stage.report.figures.append(missing(BOOKS, _NONE, NOT_ASKED))


async def _mass(field: Field) -> list[Figure]:
    stage, options = field.stage, field.stage.options
    source = mass.source(field.model, options.seed)
    async with fleet.running(
        stage.children, stage.folder, bundle=field.bundle, sources=[source] * mass.WORKERS, name="mass",
        gateway={"resume": {"max_attempts": mass.MAX_ATTEMPTS}},
    ) as running:  # fmt: skip
        calls = mass.Mass(running, options.seed, mass.asks_of(running.model, options.seed))
        outcome = await calls.play(options.points or POINTS, options.concurrency or mass.STREAMS)
        field.books += await audit(running.ledger, outcome.calls)
    told = outcome.settings()
    stage.report.settings["mass"] = told
    for request_id, found in list(outcome.differences.items())[:10]:
        stage.report.problems.append(f"mass: call {request_id} differs: {found}")
    kinds = list(outcome.differences.values())
    note = f"{told['points']} faults in {told['seconds']:.0f} s, {len(outcome.calls)} calls, {told['resumes']} resumes"
    return [
        exact(EXACT, 1 - len(kinds) / len(outcome.calls), _ALL, "share", note),
        exact(DUPLICATES, kinds.count("duplicate"), _NONE, "calls"),
        exact(GAPS, kinds.count("gap"), _NONE, "calls"),
    ]


Part = Callable[[Field], Awaitable[list[Figure]]]
PARTS: Mapping[str, tuple[Part, Mapping[str, Bound | None]]] = {
    "mass": (_mass, {EXACT: _ALL, DUPLICATES: _NONE, GAPS: _NONE}),
}
