"""The requests with which servers with scripted answers are compared. Each request is called a trial. It has a case, a
model family, and the text that the engine emits for it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from loadtests.agents.cases import Call, Case
from loadtests.agents.compare import Answer
from loadtests.agents.formats import FAMILIES, NAMED, REQUIRED, Family
from loadtests.agents.scripted import MARK

MAX_TOKENS = 8192
CHOICES = ("auto", "auto", REQUIRED, "auto", NAMED, "auto", "auto", REQUIRED, "auto", "auto", NAMED, "auto", "none")
"""Kinds of tool choice of the trials with calls, in turn. The other trials have `auto` and `none`."""
CUT_EVERY, STOP_EVERY, SINGLE_EVERY, HISTORY_EVERY, UNTHINKING_EVERY, HIDDEN_EVERY = 11, 9, 7, 4, 8, 10
"""Intervals, in trials of a family, at which a trial has: a small max_tokens; a stop string; one call at most; a
history with a tool call and its result; the template argument enable_thinking false; include_reasoning false."""
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
    """One request with a scripted answer. It is sent to the compared servers, and their answers must agree.

    `case`: the question and the expected answer. `family`: the model family, whose output format the answer
    has. `text`: what the engine generates, in this format. `choice`: the kind of tool choice. `options`:
    further fields of the request.
    """

    key: str
    case: Case
    family: Family
    text: str
    choice: str
    options: Mapping[str, Any]
    history: Sequence[Mapping[str, Any]] = ()

    @property
    def is_cut(self) -> bool:
        """Whether `max_tokens` or a stop string ends the answer before the end of `text`."""
        return "max_tokens" in self.options or "stop" in self.options

    def body(self, *, stream: bool, seed: int | None = None) -> dict[str, Any]:
        """Return the request of the trial as a dict.

        `seed`: sampling seed of the request. vllm_server.py also derives the sizes of the engine's steps from it.
        If it is None, each step has one token.
        """
        question = {"role": "user", "content": f"{self.case.question}\n{MARK.format(self.key)}"}
        body: dict[str, Any] = {
            "model": self.family.name,
            "messages": [*self.history, question],
            "tools": self.case.tools,
            "temperature": 0,
            "max_tokens": MAX_TOKENS,
            "stream": stream,
            **self.options,
        }
        if self.choice == NAMED:
            body["tool_choice"] = {"type": "function", "function": {"name": self.case.calls[0].name}}
        elif self.choice != "auto":
            body["tool_choice"] = self.choice
        if seed is not None:
            body["seed"] = seed
        return body

    def is_as_written(self, answer: Answer) -> bool:
        """Return whether an answer has exactly the expected tool calls. Not meaningful for a trial whose output is cut
        short, for example by a small max_tokens."""
        shown = 0 if self.choice == "none" else 1 if "parallel_tool_calls" in self.options else None
        expected = [(call.name, call.arguments) for call in self.case.calls[:shown]]
        return [(call.name, call.parsed) for call in answer.calls] == expected


def plan(cases: Sequence[Case], families: Sequence[Family] = FAMILIES) -> list[Trial]:
    """Return one trial for each case. The model families of the trials alternate."""
    return [
        _trial(number // len(families), f"{family.name}-{number}", case, family)
        for number, case in enumerate(cases)
        for family in (families[number % len(families)],)
    ]


def _trial(number: int, key: str, case: Case, family: Family) -> Trial:
    """Return a trial of a case with a model family. `number`: number of the trial in the family. It determines the
    answer, the options and the history. `key`: key of the trial's script."""
    options: dict[str, Any] = {}
    if _is_turn(number, SINGLE_EVERY):
        options["parallel_tool_calls"] = False
    thought: str | None = THOUGHTS[number % len(THOUGHTS)]
    if family.reasoning and _is_turn(number, HIDDEN_EVERY):
        options["include_reasoning"] = False
    if family.opens_reasoning and _is_turn(number, UNTHINKING_EVERY):
        options["chat_template_kwargs"], thought = {"enable_thinking": False}, None
    choice, text = _answer(number, case, family, thought)
    if _is_turn(number, CUT_EVERY):
        options["max_tokens"] = 20 + number % 50
    elif _is_turn(number, STOP_EVERY):
        middle = len(text) * (1 + number % 3) // 4
        options["stop"] = ["never in the text", text[middle : middle + 1 + number % 4]]
    history = _history(number, case, family) if _is_turn(number, HISTORY_EVERY) else ()
    return Trial(key, case, family, text, choice, options, history)


def _is_turn(number: int, every: int) -> bool:
    return number % every == every - 1


def _answer(number: int, case: Case, family: Family, thought: str | None) -> tuple[str, str]:
    """Return the kind of tool choice of a trial, and the text that the engine emits. `number`: number of the trial.
    `thought`: the reasoning before the answer; None for an answer without reasoning."""
    if not case.calls:
        marker = family.half_open[number // 4 % len(family.half_open)]
        text = family.answer((), REFUSALS[number % len(REFUSALS)].format(marker), thought)
        return "none" if number % 3 == 2 else "auto", text
    choice = CHOICES[number % len(CHOICES)]
    if choice == NAMED and len(case.calls) > 1:
        choice = REQUIRED
    return choice, family.answer(case.calls, TEXTS[number // 2 % len(TEXTS)], thought, choice)


def _history(number: int, case: Case, family: Family) -> list[dict[str, Any]]:
    """Return the messages of an earlier turn: an answer with two calls of the case's first tool, and their results."""
    name = case.tools[0]["function"]["name"]
    made = [Call(name, {"text": 'Köln "🙂"\n', "number": number}), Call(name, {})]
    calls = [
        {
            "id": f"call_{number}_{at}", "type": "function",
            "function": {"name": call.name, "arguments": json.dumps(call.arguments, ensure_ascii=bool(number % 3))},
        }
        for at, call in enumerate(made)
    ]  # fmt: skip
    answer: dict[str, Any] = {"role": "assistant", "content": None, "tool_calls": calls}
    if family.reasoning:
        answer["reasoning"] = "Both are needed."
    results = [
        {"role": "tool", "tool_call_id": call["id"], "content": f"{at} results\n"} for at, call in enumerate(calls)
    ]
    return [{"role": "user", "content": "Begin."}, answer, *results]


def texts(trials: Sequence[Trial]) -> Mapping[str, Mapping[str, str]]:
    """Return the text of each trial by family and key, for prepare.py."""
    out: dict[str, dict[str, str]] = {}
    for trial in trials:
        out.setdefault(trial.family.name, {})[trial.key] = trial.text
    return out
