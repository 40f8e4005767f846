"""Trials of the scripted comparison: which case is answered in which family, and what the model is made to say."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from loadtests.agents.cases import Case
from loadtests.agents.compare import Answer
from loadtests.agents.families import FAMILIES, NAMED, REQUIRED, Family
from loadtests.agents.scripted import MARK

MAX_TOKENS = 8192
CUT_EVERY, SINGLE_EVERY = 11, 7
"""Every CUT_EVERY-th trial ends by max_tokens; every SINGLE_EVERY-th trial asks for one call at most."""
CHOICES = ("auto", "auto", REQUIRED, "auto", NAMED, "auto", "auto", REQUIRED, "auto", "auto", NAMED, "auto", "none")
"""Kinds of tool choice of the trials with calls, in turn. The other trials have `auto` and `none`."""
TEXTS = ("", "I look this up.\n\n", "Ein Blick in die Liste: 数据 🙂\n")
THOUGHTS = ("", "The user wants a call. The tool fits.", 'Zwei Schritte 🙂:\n1. read\n2. call {"x": [1]}\n')
REFUSALS = (
    "None of the tools fits this question.",
    "No tool fits. A call would begin with {} but there is none, so I answer in words.",
    "I cannot call a tool here: {}",
    "Kein Werkzeug passt 🙂 – 没有合适的工具.\n\n- one\n- two\n",
)


@dataclass(frozen=True, slots=True)
class Trial:
    """A case, answered in the format of a family. `text` is what the engine emits."""

    key: str
    case: Case
    family: Family
    text: str
    choice: str = "auto"
    max_tokens: int = MAX_TOKENS
    single: bool = False

    def body(self, *, stream: bool, seed: int | None = None) -> dict[str, Any]:
        """Return the request of the trial. `seed`: for vllm_server.py, the seed of the engine's steps."""
        content = f"{self.case.question}\n{MARK.format(self.key)}"
        body: dict[str, Any] = {
            "model": self.family.name,
            "messages": [{"role": "user", "content": content}],
            "tools": self.case.tools,
            "temperature": 0,
            "max_tokens": self.max_tokens,
            "stream": stream,
        }
        if self.choice == NAMED:
            body["tool_choice"] = {"type": "function", "function": {"name": self.case.calls[0].name}}
        elif self.choice != "auto":
            body["tool_choice"] = self.choice
        if self.single:
            body["parallel_tool_calls"] = False
        if seed is not None:
            body["seed"] = seed
        return body

    def is_as_written(self, answer: Answer) -> bool:
        """Return whether an answer has exactly the calls of the case. Meaningless for a trial that is cut."""
        shown = 0 if self.choice == "none" else 1 if self.single else None
        expected = [(call.name, call.arguments) for call in self.case.calls[:shown]]
        return [(call.name, call.parsed) for call in answer.calls] == expected


def plan(cases: Sequence[Case], families: Sequence[Family] = FAMILIES, per_case: int = 1) -> list[Trial]:
    """Return the trials: each case in `per_case` of the families, which take turns."""
    out = []
    for number, case in enumerate(cases):
        for turn in range(per_case):
            family = families[(number + 3 * turn) % len(families)]
            out.append(_trial(number // len(families) + turn, f"{family.name}-{number}", case, family))
    return out


def _trial(number: int, key: str, case: Case, family: Family) -> Trial:
    """Return a trial. `number` chooses among the texts, independently of the family."""
    thought = THOUGHTS[number % len(THOUGHTS)] if family.reasoning else ""
    if case.calls:
        choice = CHOICES[number % len(CHOICES)]
        if choice == NAMED and len(case.calls) > 1:
            choice = REQUIRED
        text = family.answer(case.calls, TEXTS[number // 2 % len(TEXTS)], thought, choice)
    else:
        choice = "none" if number % 3 == 2 else "auto"
        marker = family.half_open[number // 4 % len(family.half_open)]
        text = family.answer((), REFUSALS[number % len(REFUSALS)].format(marker), thought)
    cut = number % CUT_EVERY == CUT_EVERY - 1
    return Trial(
        key, case, family, text, choice,
        max_tokens=20 + number % 50 if cut else MAX_TOKENS,
        single=number % SINGLE_EVERY == SINGLE_EVERY - 1,
    )  # fmt: skip


def texts(trials: Sequence[Trial]) -> Mapping[str, Mapping[str, str]]:
    """Return the text of each trial by family and key, for prepare.py."""
    out: dict[str, dict[str, str]] = {}
    for trial in trials:
        out.setdefault(trial.family.name, {})[trial.key] = trial.text
    return out
