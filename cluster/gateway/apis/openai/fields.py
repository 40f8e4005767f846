"""JSON objects of requests, read field by field: what has the wrong type is told by its path, null is absent."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from cluster.api.outcomes import CallError, invalid
from cluster.gateway.apis.json_values import BODY, kind, parse

INT32 = (1 << 31) - 1
INT64 = (1 << 63) - 1


def read_object(body: bytes) -> Fields:
    """The JSON object that a request's body is. Raises CallError."""
    value = parse("", body, BODY)
    if not isinstance(value, dict):
        raise invalid("body", f"must be a JSON object, got {kind(value)}")
    return Fields(value)


class Fields:
    """One JSON object. Every reader gives None, or its default, for what is absent or null, and raises CallError."""

    def __init__(self, values: Mapping[str, Any], at: str = "") -> None:
        self.values = values
        self.at = at

    def path(self, name: str) -> str:
        """A field's path in the request."""
        return f"{self.at}.{name}" if self.at else name

    def wrong(self, name: str, must: str) -> CallError:
        """The error for a field that is not what it must be."""
        return invalid(self.path(name), f"must be {must}, got {kind(self.values.get(name))}")

    def text(self, name: str) -> str | None:
        """A string."""
        value = self.values.get(name)
        if value is not None and not isinstance(value, str):
            raise self.wrong(name, "a string")
        return value

    def flag(self, name: str) -> bool:
        """A boolean; false when absent."""
        value = self.values.get(name)
        if value is not None and not isinstance(value, bool):
            raise self.wrong(name, "true or false")
        return bool(value)

    def integer(self, name: str, largest: int = INT32) -> int | None:
        """A whole number that fits."""
        value = self.values.get(name)
        return None if value is None else whole(self.path(name), value, largest)

    def number(self, name: str) -> float | None:
        """A number that a float can hold. NaN and infinity pass: a field's own range has a better word for them."""
        value = self.values.get(name)
        return None if value is None else real(self.path(name), value)

    def at_most(self, most: int, what: str, name: str = "") -> None:
        """Refuse this object, or the array or object of that name, where it has more members."""
        path, value = (self.path(name), self.values.get(name)) if name else (self.at, self.values)
        if isinstance(value, list | Mapping) and len(value) > most:
            raise invalid(path, f"at most {most} {what}, got {len(value)}")

    def strings(self, name: str, most: int | None = None) -> tuple[str, ...]:
        """An array of strings, or one string; empty when absent. One of more than `most` is not looked through."""
        value = self.values.get(name)
        if isinstance(value, str):
            return (value,)
        if most is not None:
            self.at_most(most, "strings", name)
        for i, item in enumerate(self.array(name)):
            if not isinstance(item, str):
                raise invalid(f"{self.path(name)}[{i}]", f"must be a string, got {kind(item)}")
        return tuple(self.array(name))

    def integers(self, name: str, most: int) -> tuple[int, ...]:
        """An array of whole numbers; empty when absent. One of more than `most` is not looked through."""
        self.at_most(most, "token ids", name)
        return whole_numbers(self.path(name), self.array(name))

    def array(self, name: str) -> Sequence[Any]:
        """Any array; empty when absent."""
        value = self.values.get(name)
        if value is not None and not isinstance(value, list):
            raise self.wrong(name, "an array")
        return value or ()

    def object(self, name: str) -> Fields | None:
        """An object."""
        value = self.values.get(name)
        if value is not None and not isinstance(value, dict):
            raise self.wrong(name, "an object")
        return None if value is None else Fields(value, self.path(name))

    def objects(self, name: str) -> list[Fields]:
        """An array of objects; empty when absent."""
        return [self.member(name, i) for i in range(len(self.array(name)))]

    def member(self, name: str, i: int) -> Fields:
        """An array's member that is an object."""
        item = self.array(name)[i]
        if not isinstance(item, dict):
            raise invalid(f"{self.path(name)}[{i}]", f"must be an object, got {kind(item)}")
        return Fields(item, f"{self.path(name)}[{i}]")


def whole(path: str, value: object, largest: int = INT32) -> int:
    """A whole number of JSON (3.0 is one). Raises CallError."""
    if isinstance(value, float) and value.is_integer() and abs(value) <= largest:
        return int(value)
    if isinstance(value, bool) or not isinstance(value, int):
        raise invalid(path, f"must be a whole number, got {value if isinstance(value, float) else kind(value)}")
    if not -largest - 1 <= value <= largest:
        raise invalid(path, f"must fit into {largest.bit_length() + 1} bits")
    return value


def whole_numbers(path: str, values: Sequence[Any]) -> tuple[int, ...]:
    """Whole numbers of an array. Raises CallError naming the first that is none."""
    for i, value in enumerate(values):
        if type(value) is not int or not -INT32 <= value <= INT32:
            return (*values[:i], *(whole(f"{path}[{i + j}]", item) for j, item in enumerate(values[i:])))
    return tuple(values)


def real(path: str, value: object) -> float:
    """A number of JSON as a float. Raises CallError."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise invalid(path, f"must be a number, got {kind(value)}")
    try:
        return float(value)
    except OverflowError:
        raise invalid(path, "is larger than any number that can be computed with") from None
