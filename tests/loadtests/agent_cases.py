"""Cases in BFCL's form. Tests use them because they have no access to BFCL's data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from loadtests.agents.cases import Case, case_of

FUNCTION: Mapping[str, Any] = {
    "name": "geo.find",
    "description": "Find places.",
    "parameters": {
        "type": "dict",
        "properties": {
            "city": {"type": "string", "optional": True},
            "days": {"type": "integer"},
            "box": {"type": "tuple", "items": {"type": "float"}},
            "who": {"type": "dict", "properties": {"name": {"type": "string"}}},
            "deep": {"type": "boolean"},
            "note": {"type": "any"},
        },
        "required": ["days"],
    },
}
ARGUMENTS: Sequence[Mapping[str, Any]] = (
    {"city": ["Köln 🙂", "Cologne"], "days": [3], "note": ["", "none"]},
    {"days": [-1, 1], "box": [[1.5, -2]], "deep": [True], "who": [{"name": ["Ann"], "age": [""]}]},
    {"city": ['a "quoted" name\\', ""], "days": [12345678], "box": [[]]},
)


def rows(count: int) -> list[tuple[dict[str, Any], list[dict[str, Any]]]]:
    """Return `count` rows in BFCL's form, with their ground truth. The rows expect 0, 1, 2, 0, 1, 2, ... tool calls."""
    out = []
    for number in range(count):
        row = {"id": f"made_{number}", "question": [[{"role": "user", "content": f"Question {number}?"}]]}
        truth = [{FUNCTION["name"]: ARGUMENTS[(number + call) % len(ARGUMENTS)]} for call in range(number % 3)]
        out.append((row | {"function": [FUNCTION]}, truth))
    return out


def made_cases(count: int) -> list[Case]:
    """Return `count` cases. They expect 0, 1, 2, 0, 1, 2, ... tool calls."""
    return [case_of(row, "made", truth) for row, truth in rows(count)]
