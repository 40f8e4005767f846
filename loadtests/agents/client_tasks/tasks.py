"""Tasks of twelve turns with tools: what the model says in each turn, and where a worker is killed. The
functions are pure.

A task's answers are written in the format of Qwen 3: reasoning, text, and tool calls in the Hermes format.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from loadtests.agents.cases import Call
from loadtests.agents.formats import BY_NAME

TURNS = 12
MARK = "[task {}]"
FAMILY = BY_NAME["hermes"]
SIDE = "side"
"""Key of the answer to requests that are no turn of a task, such as for a title of the conversation."""
SIDE_TEXT = "A short title"
ARGUMENTS, TEXT, REASONING = "arguments", "text", "reasoning"
DEATHS: Mapping[int, str] = {4: ARGUMENTS, 8: TEXT, 11: REASONING}
"""Turns in which the worker that generates the answer dies, each with the part of the answer that is cut."""


@dataclass(frozen=True, slots=True)
class Step:
    """The model's answer in a turn. `calls` is empty in the last turn only."""

    calls: Sequence[Call]
    text: str = ""
    reasoning: str = ""

    @property
    def written(self) -> str:
        """The text that the engine emits."""
        return FAMILY.answer(self.calls, self.text, self.reasoning)

    def middle(self, part: str) -> int:
        """Return the index in `written` at which half of `part` has been emitted. `part`: TEXT, REASONING or ARGUMENTS.
        Raises ValueError if the answer has no such text or reasoning.

        ARGUMENTS means the arguments of the last call, so that earlier calls of the turn are complete at this index.
        """
        whole = self.written
        if part == ARGUMENTS:
            start = whole.rindex('"arguments": ')
            return (start + len(whole)) // 2
        piece = self.text if part == TEXT else self.reasoning
        if not piece:
            raise ValueError(f"the answer has no {part}")
        return whole.index(piece) + len(piece) // 2


@dataclass(frozen=True, slots=True)
class Task:
    """A conversation: the `steps`, in which the model calls tools, then the `final` step without a tool call.

    `results`: results of the tool calls, in the order of the calls.
    """

    name: str
    steps: Sequence[Step]
    final: Step
    results: Sequence[str] = ()

    @property
    def mark(self) -> str:
        """Text by which the engine recognizes the task. It must be in the first message."""
        return MARK.format(self.name)

    @property
    def calls(self) -> list[Call]:
        """All calls, in order."""
        return [call for step in self.steps for call in step.calls]

    @property
    def answers(self) -> dict[str, str]:
        """The text that the engine emits, by key: the task's name and the number of the turn, from 1."""
        return {key_of(self.name, at): step.written for at, step in enumerate((*self.steps, self.final), 1)}

    @property
    def deaths(self) -> dict[str, int]:
        """Return when workers are killed: for the key of an answer, the number of characters after which its worker is
        killed."""
        return {key_of(self.name, at): self.steps[at - 1].middle(part) for at, part in DEATHS.items()}


def key_of(name: str, turn: int) -> str:
    """Return the key of the answer in a turn. `turn` counts from 1."""
    return f"{name}#{turn}"


_TURN, _MARK_BEGINS = "<|im_start|>assistant\n", "[task "
_THOUGHTS = re.compile(r"<\|im_start\|>assistant\n<think>\n(.*?)\n</think>", re.DOTALL)


def key_of_prompt(prompt: str) -> str:
    """Return the key of the prepared answer to a prompt. The prompt has the format of Qwen 3's template.

    The key consists of the name of the prompt's task and the turn. The turn is the number of earlier answers with a
    tool call, plus 1. A prompt without a task or without tools has the key SIDE.
    """
    _, found, rest = prompt.partition(_MARK_BEGINS)
    if not found or "<tools>" not in prompt:
        return SIDE
    answers = rest.split(_TURN)[1:]
    return key_of(rest.partition("]")[0], 1 + sum("<tool_call>" in each.partition("<|im_end|>")[0] for each in answers))


# -- the task of clients whose tools are functions of the program

TOOLS: Sequence[Mapping[str, Any]] = (
    {
        "name": "write_note",
        "description": "Write a note under a title.",
        "parameters": {
            "type": "object",
            "properties": {"title": {"type": "string"}, "text": {"type": "string"}},
            "required": ["title", "text"],
            "additionalProperties": False,
        },
    },
    {
        "name": "add_up",
        "description": "Add numbers up, in a unit.",
        "parameters": {
            "type": "object",
            "properties": {
                "numbers": {"type": "array", "items": {"type": "number"}},
                "unit": {"type": "string"},
                "exact": {"type": "boolean"},
            },
            "required": ["numbers", "unit", "exact"],
            "additionalProperties": False,
        },
    },
    {
        "name": "find_places",
        "description": "Find places.",
        "parameters": {
            "type": "object",
            "properties": {
                "query": {
                    "type": "object",
                    "properties": {
                        "city": {"type": "string"},
                        "tags": {"type": "array", "items": {"type": "string"}},
                    },
                    "required": ["city", "tags"],
                    "additionalProperties": False,
                },
                "limit": {"type": "integer"},
            },
            "required": ["query", "limit"],
            "additionalProperties": False,
        },
    },
)
_NOTE = (
    'A "quoted" line with a \\ backslash, a\ttab,\na second line 🙂 数据 and <b>markup</b> & {braces}, for turn {}.\n'
)
_SAID = "I do this in small steps 🙂. Ich prüfe Schritt {}, then I go on: 数据, *emphasis*, `code` and a <tag>.\n\n"
_THOUGHT = 'Turn {}: the tool fits. It takes JSON such as {{"x": [1]}}, and then\n1. I read\n2. I go on.'


def function_task(name: str) -> Task:
    """Return a task in which the model calls the functions of TOOLS: two calls in turns 1, 4, 7 and so on, one call in
    the other turns."""
    steps, results = [], []
    for turn in range(1, TURNS + 1):
        calls = [_function_call(turn)]
        if turn % 3 == 1:
            calls.append(Call("write_note", {"title": f"second of {turn}", "text": _NOTE.replace("{}", str(turn))}))
        results += [f"result {turn}.{at} of {call.name}: 'done' 🙂" for at, call in enumerate(calls, 1)]
        steps.append(
            Step(calls, _SAID.format(turn) if turn % 2 == 0 else "", _THOUGHT.format(turn) if turn % 4 else "")
        )
    return Task(name, steps, Step((), f"All {TURNS} turns of {name} are done 🙂.", "Nothing is left."), results)


def _function_call(turn: int) -> Call:
    if turn % 3 == 0:
        return Call("add_up", {"numbers": [turn, -0.5, 1e-7, 2**53 - 1], "unit": "m²", "exact": turn % 2 == 0})
    if turn % 3 == 1:
        return Call("find_places", {"query": {"city": "Köln", "tags": [f"tag {turn}", "", '"']}, "limit": turn})
    return Call("write_note", {"title": f"turn {turn}", "text": _NOTE.replace("{}", str(turn))})


# -- the outcome


@dataclass(frozen=True, slots=True)
class Submitted:
    """A request that an engine got. `emitted`: number of tokens of the answer that other engines had generated
    before."""

    key: str
    prompt: str
    emitted: int


@dataclass(frozen=True, slots=True)
class Requests:
    """Counts of the requests of a run. `turns`: turns that were asked for. `repeated`: requests that ask for a turn
    again. `side`: other requests of the client, e.g. for a title. `resumed`: answers that another worker continued."""

    turns: int = 0
    repeated: int = 0
    side: int = 0
    resumed: int = 0


@dataclass(frozen=True, slots=True)
class Outcome:
    """The outcome of a task. `wrong`: a message for each deviation from the script."""

    calls_right: int
    calls: int
    requests: Requests
    wrong: Sequence[str]


def judge_requests(task: Task, submitted: Sequence[Submitted]) -> tuple[Requests, list[str]]:
    """Return the counts of a run's requests, and a message for each fault.

    Each turn must have been requested. The turn's prompt must contain each earlier text and each tool result once, and
    no reasoning other than the script's.
    """
    new = Counter(one.key for one in submitted if not one.emitted)
    side = new.pop(SIDE, 0)
    turns = [key for key in task.answers if new[key]]
    counts = Requests(len(turns), new.total() - len(new), side, sum(1 for one in submitted if one.emitted))
    wrong = [f"turn {key} was not asked for" for key in task.answers if key not in turns]
    wrong += [f"a turn of another task: {key}" for key in new if key not in task.answers]
    for one in submitted:
        if one.key in task.answers:
            wrong += _wrong_history(task, one)
    return counts, wrong


def _wrong_history(task: Task, one: Submitted) -> list[str]:
    """Return a message for each fault in the texts and tool results of earlier turns in a prompt."""
    before = task.steps[: int(one.key.rpartition("#")[2]) - 1]
    done = sum(len(step.calls) for step in before)
    found = one.prompt.partition(task.mark)[2].count("<tool_response>")
    wrong = [f"{one.key} has {found} results of tools, not {done}"] if found != done else []
    for text in (*(step.text.strip() for step in before if step.text), *task.results[:done]):
        if (count := one.prompt.count(text)) != 1:
            wrong.append(f"{one.key} has {text!r} {count} times")
    # A client need not send reasoning back. What it sends must be whole.
    reasoning = {"", *(step.reasoning for step in before)}
    return wrong + [
        f"{one.key} has the reasoning {each!r}" for each in _THOUGHTS.findall(one.prompt) if each not in reasoning
    ]


def judge_calls(expected: Sequence[Call], made: Sequence[Call]) -> tuple[int, list[str]]:
    """Return the number of expected calls that were made, and a message for each fault. The order of the calls is not
    judged here; judge_requests checks the order of the turns by the prompts."""
    left, missed = list(made), []
    for call in expected:
        if call in left:
            left.remove(call)
        else:
            missed.append(call)
    wrong = [f"not made: {call}" for call in missed] + [f"not in the script: {call}" for call in left]
    return len(expected) - len(missed), wrong
