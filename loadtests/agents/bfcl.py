"""The part `bfcl`: the cases of BFCL (cases.py) on vLLM's own servers and on Headrace, with scripted tokens; all
answers must be equal.

The engines of both sides emit the same tokens: the expected calls of a case, in the format of one of ten families, some
with text and reasoning before the calls. For a case without a call they emit text with pieces that look like the
beginning of a call. vLLM's servers get one token a step, because some of vLLM's parsers return different parts for
larger steps. Headrace's engine gives 1 to 5 tokens a step.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from loadtests.agents import cases, servers
from loadtests.agents.cases import Case
from loadtests.agents.compare import CUT, NAMED_END, Answer, Difference, differences, known_finish
from loadtests.agents.formats import NAMED
from loadtests.agents.scripted import read_prompts
from loadtests.agents.trials import Trial, plan, texts
from loadtests.figures import Bound, Figure
from loadtests.scenarios.common import Stage
from loadtests.scenarios.parts import exact

COMPARED = "BFCL cases, each answered whole and streamed, by vLLM's server and by Headrace"
CALLED = "cases in which vLLM's own server reports a tool call"
FORMATS = "tool formats among them"
DIFFERENT = "answers that differ from vLLM's own server: text, reasoning, calls, finish reason"
PROMPTS = "cases whose prompt differs from vLLM's, in token ids"
CUT_ROW = "answers cut within a call that vLLM ends with tool_calls, and Headrace with length or stop"
NAMED_ROW = "answers to a named tool choice that vLLM ends with stop, and Headrace with tool_calls"
UNEXPECTED = "answers of vLLM's server that lack the expected calls"
STEP_SIZE = "answers of vLLM's server that change with the size of the engine's steps"
ROWS: Mapping[str, Bound | None] = {
    COMPARED: Bound(">=", 400),
    CALLED: Bound(">=", 300),
    FORMATS: Bound(">=", 10),
    DIFFERENT: Bound("<=", 0),
    PROMPTS: Bound("<=", 0),
    CUT_ROW: None,
    NAMED_ROW: None,
    UNEXPECTED: None,
    STEP_SIZE: None,
}
CONCURRENCY = 16
SHOWN, KEPT = 10, 100
"""Number of differences that are printed, and that are kept in the report."""
STEPS_SEED = 7
MODES = {"whole": False, "streamed": True}


@dataclass(frozen=True, slots=True)
class Compared:
    """The answers of vLLM (`theirs`) and of Headrace (`ours`) to one trial. `mode`: whether the answers were sent in
    one piece or streamed. `stepped`: vLLM's answer if its engine emits several tokens in a step."""

    trial: Trial
    mode: str
    theirs: Answer
    ours: Answer
    stepped: Answer

    @property
    def differences(self) -> list[Difference]:
        """The differences between the two answers. A finish reason that differs in a known way is left out, since
        another row of the report counts it."""
        found = differences(self.theirs, self.ours)
        return [one for one in found if one.field != "finish"] if self.other_finish else found

    @property
    def other_finish(self) -> str:
        """The known reason why the two answers have different finish reasons: CUT or NAMED_END (see `known_finish`); ""
        if the finish reasons are equal, or differ for an unknown reason."""
        trial = self.trial
        return known_finish(self.theirs, self.ours, is_cut=trial.is_cut, is_named=trial.choice == NAMED)

    def as_json(self) -> dict[str, Any]:
        """Return the request and each field in which the answers differ, with vLLM's and Headrace's values."""
        fields = {one.field: {"vllm": one.theirs, "headrace": one.ours} for one in self.differences}
        return {**self.request, "differences": fields}

    @property
    def is_unexpected(self) -> bool:
        """Whether the calls in vLLM's own answer differ from the calls of the case. False if `max_tokens` or a stop
        string ended the answer early."""
        return not self.trial.is_cut and not self.trial.is_as_written(self.theirs)

    @property
    def request(self) -> dict[str, Any]:
        """The case and options of the request, and the text that the engine emitted."""
        trial = self.trial
        return {
            "case": trial.case.name, "family": trial.family.name, "mode": self.mode, "tool_choice": trial.choice,
            **trial.options, "turns before": len(trial.history), "emitted": trial.text,
        }  # fmt: skip


def mixed(all_cases: Sequence[Case], count: int | None, seed: int) -> list[Case]:
    """Return `count` random cases, or all cases if `count` is None. The cases of each category are spread evenly over
    the list."""
    draw = random.Random(seed)
    by_category = {name: list(group) for name, group in groupby(all_cases, lambda case: case.category)}
    groups = [draw.sample(group, k=len(group)) for group in by_category.values()]
    ranked = sorted(((at / len(group), case.name, case) for group in groups for at, case in enumerate(group)))
    return [case for _, _, case in ranked][:count]


async def measure(stage: Stage) -> list[Figure]:
    """Run the comparison and return the report's rows. Raises NoData if BFCL's data is missing, or DidNotStart."""
    chosen = mixed(cases.load(), stage.options.cases, stage.options.seed)
    trials = plan(chosen)
    stage.screen.say(f"{len(trials)} cases: writing models and scripts")
    models = await servers.prepare(stage.children, stage.folder, texts(trials))
    stage.screen.say("starting vLLM's servers")
    theirs = await servers.start_vllm(stage.children, stage.folder, models)
    stage.screen.say("starting Headrace")
    ours = await servers.start_headrace(stage.children, stage.folder, models, stage.options.seed)
    try:
        compared = await compare(trials, theirs, ours)
    finally:
        theirs.close()
        ours.close()
    wrong_prompts = different_prompts(theirs, ours)
    report(stage, compared, wrong_prompts)
    return figures(compared, len(wrong_prompts))


async def compare(trials: Sequence[Trial], theirs: servers.Side, ours: servers.Side) -> list[Compared]:
    """Send every trial to both sides in every mode and return the answers."""
    out = []
    for mode, stream in MODES.items():
        plain = [trial.body(stream=stream) for trial in trials]
        stepped = [trial.body(stream=stream, seed=STEPS_SEED) for trial in trials]
        columns = [await ask_all(theirs, plain), await ask_all(ours, plain), await ask_all(theirs, stepped)]
        out += [Compared(trial, mode, *answers) for trial, *answers in zip(trials, *columns, strict=True)]
    return out


async def ask_all(side: servers.Side, bodies: Sequence[Mapping[str, Any]]) -> list[Answer]:
    """Make calls, CONCURRENCY at a time; return the answers in the order of the calls."""
    free = asyncio.Semaphore(CONCURRENCY)

    async def ask(body: Mapping[str, Any]) -> Answer:
        async with free:
            return await side.servers[body["model"]].ask(body)

    return await asyncio.gather(*(ask(body) for body in bodies))


def different_prompts(theirs: servers.Side, ours: servers.Side) -> list[str]:
    """Return the keys of the trials in which the engines got different prompts."""
    one, other = read_prompts(theirs.prompts), read_prompts(ours.prompts)
    return sorted(key for key in one.keys() | other.keys() if len({*one.get(key, ()), *other.get(key, ())}) != 1)


def figures(compared: Sequence[Compared], wrong_prompts: int) -> list[Figure]:
    """Return the report's rows for the BFCL cases. `compared`: the compared outputs. `wrong_prompts`: number of trials
    in which the two sides got different prompts."""
    whole = [one for one in compared if one.mode == "whole"]
    values = {
        COMPARED: len({one.trial.case.name for one in compared}),
        CALLED: len({one.trial.case.name for one in whole if one.theirs.calls}),
        FORMATS: len({one.trial.family.name for one in whole if one.theirs.calls}),
        DIFFERENT: sum(1 for one in compared if one.differences),
        PROMPTS: wrong_prompts,
        CUT_ROW: sum(1 for one in compared if one.other_finish == CUT),
        NAMED_ROW: sum(1 for one in compared if one.other_finish == NAMED_END),
        UNEXPECTED: sum(1 for one in compared if one.is_unexpected),
        STEP_SIZE: sum(1 for one in compared if differences(one.theirs, one.stepped)),
    }
    return [exact(name, values[name], bound) for name, bound in ROWS.items()]


def report(stage: Stage, compared: Sequence[Compared], wrong_prompts: Sequence[str]) -> None:
    """Print the first differences, and add all counts and differences to the report's settings."""
    wrong = [one.as_json() for one in compared if one.differences]
    for one in wrong[:SHOWN]:
        stage.screen.say(f"differs: {one}")
    for key in wrong_prompts[:SHOWN]:
        stage.screen.say(f"prompts differ: {key}")
    stage.report.settings |= {
        "bfcl: cases by category": dict(Counter(one.trial.case.category for one in compared if one.mode == "whole")),
        "bfcl: answers by format": dict(Counter(one.trial.family.name for one in compared)),
        "bfcl: differing answers by format": dict(Counter(one["family"] for one in wrong)),
        "bfcl: differences": wrong[:KEPT],
        "bfcl: answers of vLLM without the expected calls": [
            {**one.request, "calls": [(call.name, call.arguments) for call in one.theirs.calls]}
            for one in compared
            if one.is_unexpected
        ][:KEPT],
        "bfcl: differing prompts": list(wrong_prompts[:KEPT]),
    }
