"""Typed access to the fields of JSON objects in a request. Each error names the path of the field. A field that holds
null counts as absent."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from cluster.api.outcomes import CallError, Outcome, Violation, invalid
from cluster.gateway.apis.json_values import BODY, JsonBounds, kind, parse

INT32 = (1 << 31) - 1
INT64 = (1 << 63) - 1


def read_object(body: bytes, bounds: JsonBounds | None = BODY) -> Fields:
    """Parse the body of a request as a JSON object. Raises CallError. `bounds`: the largest allowed numbers of values;
    None if the values have been counted before."""
    value = parse("", body, bounds)
    if not isinstance(value, dict):
        raise invalid("body", f"must be a JSON object, got {kind(value)}")
    return Fields(value)


def unsupported(path: str, remedy: str = "leave it out") -> CallError:
    """Return the error for a known field that this release does not support."""
    return CallError(
        Outcome.UNSUPPORTED_FEATURE,
        f"{path}: not supported in this release; {remedy}",
        violations=[Violation(path, "not supported")],
    )


class Fields:
    """A JSON object whose fields are read by type. A method that reads a field returns None or the documented default
    for an absent field, and raises CallError for an invalid field."""

    def __init__(self, values: Mapping[str, Any], at: str = "") -> None:
        self.values = values
        self.at = at

    def path(self, name: str) -> str:
        """Return the path of a field in the request."""
        return f"{self.at}.{name}" if self.at else name

    def wrong(self, name: str, must: str) -> CallError:
        """Return the error for a field of the wrong type. `must`: the type that the field must have."""
        return invalid(self.path(name), f"must be {must}, got {kind(self.values.get(name))}")

    def text(self, name: str) -> str | None:
        """Return the string in a field."""
        value = self.values.get(name)
        if value is not None and not isinstance(value, str):
            raise self.wrong(name, "a string")
        return value

    def flag(self, name: str, default: bool = False) -> bool:
        """Return the boolean in a field."""
        value = self.values.get(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.wrong(name, "true or false")
        return value

    def integer(self, name: str, largest: int = INT32) -> int | None:
        """Return the whole number in a field. The allowed range is -largest - 1 to largest."""
        value = self.values.get(name)
        return None if value is None else whole(self.path(name), value, largest)

    def number(self, name: str) -> float | None:
        """Return the number in a field as a float. NaN and infinity are allowed here, since the range check of the
        field reports them with a better message."""
        value = self.values.get(name)
        return None if value is None else real(self.path(name), value)

    def at_most(self, most: int, what: str, name: str = "") -> None:
        """Raise CallError if the array or object in the field `name` has more than `most` members. Without `name`, this
        object itself is checked. `what`: the members in words, for the error."""
        path, value = (self.path(name), self.values.get(name)) if name else (self.at, self.values)
        if isinstance(value, list | Mapping) and len(value) > most:
            raise invalid(path, f"at most {most} {what}, got {len(value)}")

    def strings(self, name: str, most: int | None = None) -> tuple[str, ...]:
        """Return the strings in a field, which holds an array of strings or one string; empty for an absent field. An
        array of more than `most` strings is refused before its strings are read."""
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
        """Return the array of whole numbers in a field; empty for an absent field. An array of more than `most` numbers
        is refused before its numbers are read."""
        self.at_most(most, "token ids", name)
        return whole_numbers(self.path(name), self.array(name))

    def array(self, name: str) -> Sequence[Any]:
        """Return the array in a field, with values of any type; empty for an absent field."""
        value = self.values.get(name)
        if value is not None and not isinstance(value, list):
            raise self.wrong(name, "an array")
        return value or ()

    def object(self, name: str) -> Fields | None:
        """Return the object in a field."""
        value = self.values.get(name)
        if value is not None and not isinstance(value, dict):
            raise self.wrong(name, "an object")
        return None if value is None else Fields(value, self.path(name))

    def objects(self, name: str) -> list[Fields]:
        """Return the array of objects in a field; empty for an absent field."""
        return [self.member(name, i) for i in range(len(self.array(name)))]

    def member(self, name: str, i: int) -> Fields:
        """Return the object at index `i` of the array in a field."""
        item = self.array(name)[i]
        if not isinstance(item, dict):
            raise invalid(f"{self.path(name)}[{i}]", f"must be an object, got {kind(item)}")
        return Fields(item, f"{self.path(name)}[{i}]")


def whole(path: str, value: object, largest: int = INT32) -> int:
    """Return a JSON number as an int. A float without a fraction, like 3.0, is accepted. Raises CallError."""
    if isinstance(value, float) and value.is_integer() and abs(value) <= largest:
        return int(value)
    if isinstance(value, bool) or not isinstance(value, int):
        raise invalid(path, f"must be a whole number, got {value if isinstance(value, float) else kind(value)}")
    if not -largest - 1 <= value <= largest:
        raise invalid(path, f"must fit into {largest.bit_length() + 1} bits")
    return value


def whole_numbers(path: str, values: Sequence[Any]) -> tuple[int, ...]:
    """Return the values of an array as ints. Raises CallError, which names the first invalid value."""
    for i, value in enumerate(values):
        if type(value) is not int or not -INT32 <= value <= INT32:
            return (*values[:i], *(whole(f"{path}[{i + j}]", item) for j, item in enumerate(values[i:])))
    return tuple(values)


def real(path: str, value: object) -> float:
    """Return a JSON number as a float. Raises CallError."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise invalid(path, f"must be a number, got {kind(value)}")
    try:
        return float(value)
    except OverflowError:
        raise invalid(path, "is too large for a 64-bit floating point number") from None
