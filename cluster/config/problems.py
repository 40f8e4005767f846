"""Problems of a configuration, each with the key's path, the expected form and the remedy.

Pydantic alone stops a model's validators at the first wrong field, and its message for `300s` is "unable to parse
string". With this module, a validator may report several problems at once (`ProblemsError`). Messages about unknown
keys suggest a known key. Messages about numbers with a unit show the value in the key's unit.
"""

from __future__ import annotations

import difflib
import re
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ValidationError

Path = tuple[str | int, ...]

_QUANTITY = re.compile(r"\s*(\d+(?:[._]\d+)*)\s*([A-Za-zµ%]+)\s*")
_SECONDS = {
    "us": 1e-6,
    "µs": 1e-6,
    "ms": 1e-3,
    "s": 1.0,
    "sec": 1.0,
    "m": 60.0,
    "min": 60.0,
    "h": 3600.0,
    "d": 86_400.0,
}
_COUNTS = {
    "k": 1e3,
    "m": 1e6,
    "g": 1e9,
    "b": 1e9,
    "t": 1e12,
    "ki": 2.0**10,
    "mi": 2.0**20,
    "gi": 2.0**30,
    "ti": 2.0**40,
}
_UNITS = {"s": "seconds", "bytes": "bytes", "tokens": "tokens", "days": "days", "minute": "a count per minute"}
_EMPTY = "the key has no value; fill it, or remove it"
_ADDRESS = "host:port, of an IPv6 address [address]:port"
_FORMS = {
    **dict.fromkeys(("grpc", "http", "link", "admin", "metrics"), _ADDRESS),
    "gateways": f"{_ADDRESS}, or srv://_link._tcp.NAME",
    "name": "lower-case letters, digits, '.', '_' or '-', 1 to 63 characters, a letter or digit at both ends",
    "digest": "64 digits of 0-9 and a-f in lower case, also with sha256: before them",
    "dashboard_url": "a URL that begins with http:// or https://",
}
"""Expected form, in words, of each key that is checked against a pattern."""
_FLAGS = ("true", "false", "yes", "no", "on", "off")


@dataclass(frozen=True, slots=True)
class Problem:
    """A problem in a configuration. `path`: keys and list positions that lead to the place. `text` names the remedy.

    `missing`: a required key is absent.
    """

    path: Path
    text: str
    missing: bool = False

    @property
    def where(self) -> str:
        """The path in the form models[0].replicas.max; "" for the whole file."""
        return written(self.path)

    def __str__(self) -> str:
        return f"{self.where}: {self.text}" if self.path else self.text


class ProblemsError(ValueError):
    """Raised by a validator that has found problems. The paths of the problems are relative to the validated value."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        super().__init__("; ".join(map(str, problems)))
        self.problems = tuple(problems)


def raise_all(problems: Iterable[Problem]) -> None:
    """Raise ProblemsError with the problems if there are any."""
    if collected := list(problems):
        raise ProblemsError(collected)


def written(path: Path) -> str:
    """Return the path of a configuration key as text, such as `models[0].replicas.max`."""
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else str(part)
    return text


def problems_of(error: ValidationError, root: type[BaseModel]) -> list[Problem]:
    """Return the problems that pydantic and this project's validators report, one problem for each wrong key."""
    problems: list[Problem] = []
    for detail in error.errors():
        path, keys = _path_and_keys(detail["loc"], root)
        cause = (detail.get("ctx") or {}).get("error")
        if isinstance(cause, ProblemsError):
            problems += [Problem((*path, *inner.path), inner.text) for inner in cause.problems]
            continue
        text = _message(detail, path, keys)
        if text and all(known.path != path or known.text != text for known in problems):
            problems.append(Problem(path, text, detail["type"] == "missing"))
    return _without_other_forms(problems)


def _without_other_forms(problems: list[Problem]) -> list[Problem]:
    """Remove the problem `must be a string` of a key that has a list, if the items of the list have problems.

    For a key that may be a string or a list, pydantic reports the problems of both forms.
    """
    parents = {problem.path[:at] for problem in problems for at in range(len(problem.path))}
    return [
        problem for problem in problems if not (problem.path in parents and problem.text.startswith("must be a string"))
    ]


def _path_and_keys(location: Sequence[int | str], root: type[BaseModel]) -> tuple[Path, Sequence[str]]:
    """Return the path of a pydantic location, and the keys that the schema allows at that path.

    For a key with a union type, pydantic adds the name of one of the types to the location. The returned path does not
    contain these names.
    """
    path: list[str | int] = []
    models: list[type[BaseModel]] = [root]
    for part in location:
        if isinstance(part, int):
            path.append(part)
            continue
        fields = {field.alias or name: field for model in models for name, field in model.model_fields.items()}
        if part in fields:
            models = [*_models_in(fields[part].annotation)]
        elif re.search(r"[\[\](){}]|^(str|int|float|bool|constrained-)", part) and path:
            continue
        else:
            return (*path, *([part] if part else [])), [*fields]
        path.append(part)
    return tuple(path), [name for model in models for name in model.model_fields]


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in typing.get_args(annotation):
        yield from _models_in(argument)


def _message(error: Mapping[str, Any], path: Path, keys: Sequence[str]) -> str:
    value, kind = error.get("input"), str(error["type"])
    last = next((str(part) for part in reversed(path) if isinstance(part, str)), "")
    if kind == "extra_forbidden":
        near = difflib.get_close_matches(last.replace("-", "_"), keys, n=1, cutoff=0.6)
        return f"unknown key{f'; did you mean `{near[0]}`?' if near else ''}"
    if kind == "missing" and path == ("api_version",):
        return "Field required: write `api_version: headrace/v1`"
    if kind == "missing":
        return "Field required"
    if kind == "literal_error" and path == ("api_version",):
        return (
            f"{shown(value)} is not read by this release, which reads 'headrace/v1': write `api_version: headrace/v1` "
            "and check the file again; CHANGELOG.md lists keys that have changed between versions"
        )
    message = str(error["msg"]).removeprefix("Value error, ")
    if kind.startswith(("int_", "float_")):
        return f"must be {_expected_number(last, kind)}, not {shown(value)}{_converted(last, value)}"
    if kind == "string_type":
        return f"must be a string, not {shown(value)}{_quoting_hint(value)}"
    if kind.startswith("bool_"):
        return f"must be true or false, not {shown(value)}"
    if kind in ("tuple_type", "list_type"):
        return f"must be a list, not {shown(value)}: {_EMPTY if value is None else 'begin it with [ or -'}"
    if kind in ("model_type", "dict_type", "mapping_type", "model_attributes_type"):
        return f"must be a mapping of keys, not {shown(value)}{f': {_EMPTY}' if value is None else ''}"
    if kind == "string_pattern_mismatch" and (words := _FORMS.get(last)):
        return f"must be {words}, not {shown(value)}"
    return f"{message}, not {shown(value)}" if kind in ("string_pattern_mismatch", "literal_error") else message


def _expected_number(key: str, kind: str) -> str:
    whole = "a whole number" if kind.startswith("int_") else "a number"
    unit = _UNITS.get(key.rsplit("_", 1)[-1])
    return f"{unit}, {whole} without a unit" if unit else whole


def _converted(key: str, value: Any) -> str:
    """Return a hint with the value in the key's unit, such as `: write 300` for `300s`; "" for a value without a
    unit."""
    quantity = _QUANTITY.fullmatch(value) if isinstance(value, str) else None
    if quantity is None:
        return ""
    unit = quantity[2]
    factors = _SECONDS if key.endswith("_s") else _COUNTS
    factor = factors.get(unit.lower().removesuffix("b") if factors is _COUNTS and len(unit) > 1 else unit.lower())
    if factor is None:
        return ": write the number alone"
    return f": write {float(quantity[1].replace('_', '')) * factor:.15g}"


def _quoting_hint(value: Any) -> str:
    scalar = isinstance(value, bool | int | float) or type(value).__module__ == "datetime"
    return f': write it in quotes, "{shown(value)}"' if scalar else ""


_YAML_WORDS = {"None": "null", "True": "true", "False": "false"}


def shown(value: Any) -> str:
    """Return a value in the form that error messages show, cut to a length that fits on a line."""
    text = _YAML_WORDS.get(repr(value), repr(value)) if value is None or isinstance(value, bool) else repr(value)
    if type(value).__module__ == "datetime":
        text = str(value)
    return text if len(text) <= 80 else text[:77] + "..."
