"""Typed access to the fields of a request's JSON objects. Errors name the field's path; null counts as absent."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from cluster.api.outcomes import CallError, invalid
from cluster.gateway.apis.json_values import BODY, kind, parse

INT32 = (1 << 31) - 1
INT64 = (1 << 63) - 1


def read_object(body: bytes) -> Fields:
    """Parse a request's body as a JSON object. Raises CallError."""
    value = parse("", body, BODY)
    if not isinstance(value, dict):
        raise invalid("body", f"must be a JSON object, got {kind(value)}")
    return Fields(value)


class Fields:
    """A JSON object. Readers return None or their default for a field that is absent or null, and raise CallError."""

    def __init__(self, values: Mapping[str, Any], at: str = "") -> None:
        self.values = values
        self.at = at

    def path(self, name: str) -> str:
        """A field's path in the request."""
        return f"{self.at}.{name}" if self.at else name

    def wrong(self, name: str, must: str) -> CallError:
        """The error for a field of the wrong type."""
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
        """A whole number between -largest - 1 and largest."""
        value = self.values.get(name)
        return None if value is None else whole(self.path(name), value, largest)

    def number(self, name: str) -> float | None:
        """A number that a float can hold. NaN and infinity pass; the field's range check reports them better."""
        value = self.values.get(name)
        return None if value is None else real(self.path(name), value)

    def at_most(self, most: int, what: str, name: str = "") -> None:
        """Refuse this object, or its array or object `name`, if it has more than `most` members."""
        path, value = (self.path(name), self.values.get(name)) if name else (self.at, self.values)
        if isinstance(value, list | Mapping) and len(value) > most:
            raise invalid(path, f"at most {most} {what}, got {len(value)}")

    def strings(self, name: str, most: int | None = None) -> tuple[str, ...]:
        """An array of strings, or one string; empty when absent. More than `most` are refused unread."""
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
        """An array of whole numbers; empty when absent. More than `most` are refused unread."""
        self.at_most(most, "token ids", name)
        return whole_numbers(self.path(name), self.array(name))

    def array(self, name: str) -> Sequence[Any]:
        """An array of any values; empty when absent."""
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
        """The object at index `i` of an array."""
        item = self.array(name)[i]
        if not isinstance(item, dict):
            raise invalid(f"{self.path(name)}[{i}]", f"must be an object, got {kind(item)}")
        return Fields(item, f"{self.path(name)}[{i}]")


def whole(path: str, value: object, largest: int = INT32) -> int:
    """A JSON number as an int; 3.0 is accepted. Raises CallError."""
    if isinstance(value, float) and value.is_integer() and abs(value) <= largest:
        return int(value)
    if isinstance(value, bool) or not isinstance(value, int):
        raise invalid(path, f"must be a whole number, got {value if isinstance(value, float) else kind(value)}")
    if not -largest - 1 <= value <= largest:
        raise invalid(path, f"must fit into {largest.bit_length() + 1} bits")
    return value


def whole_numbers(path: str, values: Sequence[Any]) -> tuple[int, ...]:
    """An array's values as ints. Raises CallError that names the first invalid one."""
    for i, value in enumerate(values):
        if type(value) is not int or not -INT32 <= value <= INT32:
            return (*values[:i], *(whole(f"{path}[{i + j}]", item) for j, item in enumerate(values[i:])))
    return tuple(values)


def real(path: str, value: object) -> float:
    """A JSON number as a float. Raises CallError."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise invalid(path, f"must be a number, got {kind(value)}")
    try:
        return float(value)
    except OverflowError:
        raise invalid(path, "is too large for a 64-bit floating point number") from None
