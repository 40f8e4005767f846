"""Cases with tools in the form of BFCL (Berkeley Function Calling Leaderboard, package bfcl-eval, Apache 2.0).

The data is not part of this repository: `make bench-agents` fetches the package into .bfcl.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loadtests.children import ROOT
from loadtests.traces import NoData

BFCL = ROOT / ".bfcl"
CATEGORIES = ("simple_python", "multiple", "parallel", "irrelevance")
WITHOUT_CALLS = "irrelevance"
_TYPES = {"dict": "object", "float": "number", "tuple": "array", "list": "array"}
"""JSON schema's types by BFCL's names, where the names differ."""

Arguments = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Call:
    """A call of a tool."""

    name: str
    arguments: Arguments


@dataclass(frozen=True, slots=True)
class Case:
    """A question with tools. `calls` is the expected answer; empty if no tool fits the question."""

    name: str
    category: str
    question: str
    tools: Sequence[Mapping[str, Any]]
    calls: Sequence[Call] = ()


def load(folder: Path = BFCL, categories: Sequence[str] = CATEGORIES) -> list[Case]:
    """Read the cases of the categories. Raises NoData if the package is missing."""
    data = folder / "bfcl_eval" / "data"
    if not data.is_dir():
        raise NoData(f"{data} is missing: `make bench-agents` fetches BFCL's data (PyPI's bfcl-eval, Apache 2.0)")
    return [case for category in categories for case in _category(data, category)]


def _category(data: Path, category: str) -> Iterator[Case]:
    file = f"BFCL_v4_{category}.json"
    answers: dict[str, list[dict[str, Any]]] = {}
    if category != WITHOUT_CALLS:
        answers = {row["id"]: row["ground_truth"] for row in _rows(data / "possible_answer" / file)}
    for row in _rows(data / file):
        yield case_of(row, category, answers.get(row["id"], ()))


def _rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines() if line.strip()]


def case_of(row: Mapping[str, Any], category: str, ground_truth: Sequence[Mapping[str, Arguments]] = ()) -> Case:
    """Return the case of a row of BFCL (Berkeley Function Calling Leaderboard), a data set of tool calls.
    `ground_truth`: for each call, the allowed values of each argument by name."""
    calls = [
        Call(public_name(name), {key: first_allowed(values) for key, values in arguments.items() if _is_given(values)})
        for call in ground_truth
        for name, arguments in call.items()
    ]
    ((message,),) = row["question"]
    return Case(row["id"], category, message["content"], [_tool(function) for function in row["function"]], calls)


def public_name(name: str) -> str:
    """Return a function's name with the characters that OpenAI's API allows, as BFCL itself does for OpenAI's models:
    `math.factorial` becomes `math_factorial`."""
    return re.sub(r"[^A-Za-z0-9_-]", "_", name)[:64]


def _is_given(values: Any) -> bool:
    """Return whether a tool call must contain the argument whose allowed values are `values`. The argument may be left
    out if the first allowed value is ""."""
    return not isinstance(values, list) or (bool(values) and values[0] != "")


def first_allowed(values: Any) -> Any:
    """Return the first allowed value of an argument. If this value is an object, each of its fields has a list of
    allowed values too, and gets the first of them."""
    value = values[0] if isinstance(values, list) else values
    if isinstance(value, dict):
        return {key: first_allowed(inner) for key, inner in value.items() if _is_given(inner)}
    if isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
        return [first_allowed([item]) for item in value]
    return value


def _tool(function: Mapping[str, Any]) -> dict[str, Any]:
    """Convert a function of BFCL to a tool of OpenAI's API."""
    return {
        "type": "function",
        "function": {
            "name": public_name(function["name"]),
            "description": function["description"],
            "parameters": _schema(function["parameters"]),
        },
    }


def _schema(given: Any) -> Any:
    """Convert a schema of BFCL to a JSON schema: use JSON's names of types, and remove `any` and the keys that only
    BFCL has."""
    if isinstance(given, list):
        return [_schema(item) for item in given]
    if not isinstance(given, dict):
        return given
    out = {key: _schema(value) for key, value in given.items()}
    kind = out.get("type")
    if isinstance(kind, str):
        out["type"] = _TYPES.get(kind, kind)
        if kind == "any":
            del out["type"]
        if not isinstance(out.get("optional", False), dict):
            out.pop("optional", None)
    return out
