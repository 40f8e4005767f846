"""How much a serialized protobuf message holds, before anything is made of it.

protobuf makes an object of every two bytes of a list of empty messages. A scan of the tags, which skips texts and
numbers whole, stops as soon as there are too many. What is malformed is left to protobuf, which says what is wrong.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Final

from google.protobuf.descriptor import FieldDescriptor

IDS_AN_ELEMENT: Final = 32
"""Bytes of packed numbers that weigh as one element in a scan that does not count them."""
_LOW_BYTES: Final = bytes(range(128))
_NUMBERS: Final = frozenset(
    (FieldDescriptor.TYPE_INT32, FieldDescriptor.TYPE_INT64, FieldDescriptor.TYPE_UINT32, FieldDescriptor.TYPE_UINT64)
)


@dataclass(slots=True)
class _Layout:
    """Of a message: names of its fields by number, layouts of those that are messages, and which are packed numbers."""

    names: dict[int, str] = field(default_factory=dict)
    nested: dict[int, _Layout] = field(default_factory=dict)
    packed: set[int] = field(default_factory=set)


_layouts: dict[str, _Layout] = {}


def _layout(descriptor: Any) -> _Layout:
    known = _layouts.get(descriptor.full_name)
    if known is None:
        known = _layouts[descriptor.full_name] = _Layout()
        for one in descriptor.fields:
            known.names[one.number] = one.name
            if one.message_type is not None:
                known.nested[one.number] = _layout(one.message_type)
            elif one.is_repeated and one.type in _NUMBERS:
                known.packed.add(one.number)
    return known


@dataclass(frozen=True, slots=True)
class Scanned:
    """What a message holds. `field` is the top-level one that holds too much, if the scan has ended for that."""

    elements: int
    numbers: int = 0
    field: str = ""


def scan(
    descriptor: Any, data: bytes | bytearray, most: int, *, members: int = 0, count_numbers: bool = False
) -> Scanned:
    """Count fields and members of lists, at all levels, until there are more than `most`, or more than `members` of
    one field at the top.

    Packed numbers are counted apart with `count_numbers`, which reads them; else they weigh as elements by their size.
    """
    found = _Scan(data, most, members or most, count_numbers)
    layout = _layout(descriptor)
    try:
        found.run(layout)
    except IndexError:  # it ends in the midst of a field
        return Scanned(found.elements, found.numbers)
    return Scanned(found.elements, found.numbers, layout.names.get(found.full, "request") if found.full else "")


class _Scan:
    def __init__(self, data: bytes | bytearray, most: int, members: int, count_numbers: bool) -> None:
        self._data = data
        self._most = most
        self._members = members
        self._count_numbers = count_numbers
        self.elements = 0
        self.numbers = 0
        self.full = 0
        """The number of the top-level field at which the scan ended for too much."""

    def run(self, layout: _Layout) -> None:
        """Raises IndexError at a cut field. Most tags and lengths are one byte, which is read here."""
        data, at, end, most = self._data, 0, len(self._data), self._most
        top = 0
        counts: dict[int, int] = {}
        outer: list[tuple[int, _Layout]] = []
        while self.elements <= most:
            if at >= end:
                if not outer:
                    return
                end, layout = outer.pop()
                continue
            self.elements += 1
            tag = data[at]
            at += 1
            if tag > 127:
                tag, at = read_varint(data, at - 1)
            number = tag >> 3
            if not outer:
                top = number
                counts[number] = count = counts.get(number, 0) + 1
                if count > self._members:
                    break
            wire = tag & 7
            if wire == 2:
                length = data[at]
                at += 1
                if length > 127:
                    length, at = read_varint(data, at - 1)
                if (nested := layout.nested.get(number)) is not None and at + length <= end:
                    outer.append((end, layout))
                    layout, end = nested, at + length
                    continue
                if number in layout.packed:
                    self._count(at, length)
                at += length
            elif wire == 0:
                at = read_varint(data, at)[1]
            elif wire in (1, 5):
                at += 8 if wire == 1 else 4
            elif wire == 3:
                at = self._group(at, end)
            else:  # the end of a group that has not begun, and what there is no wire type for
                raise IndexError
        self.full = top

    def _group(self, at: int, end: int) -> int:
        """Count the fields of a group, which protobuf keeps as unknown ones, and return where it ends. Raises
        IndexError."""
        data, depth = self._data, 1
        while depth and self.elements <= self._most:
            if at >= end:
                raise IndexError
            self.elements += 1
            tag, at = read_varint(data, at)
            wire = tag & 7
            if wire == 2:
                length, at = read_varint(data, at)
                at += length
            elif wire == 0:
                at = read_varint(data, at)[1]
            elif wire in (1, 5):
                at += 8 if wire == 1 else 4
            elif wire in (3, 4):
                depth += 1 if wire == 3 else -1
            else:
                raise IndexError
        return at

    def _count(self, at: int, length: int) -> None:
        if self._count_numbers:
            part = self._data[at : at + length]
            self.numbers += len(part) - len(part.translate(None, _LOW_BYTES))
        else:
            self.elements += length // IDS_AN_ELEMENT


def read_varint(data: bytes | bytearray, at: int) -> tuple[int, int]:
    """The number at `at`, and where the next thing is. Raises IndexError where the data ends before it."""
    value = data[at]
    at += 1
    if value < 128:
        return value, at
    value &= 127
    shift = 7
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
        shift += 7
        if shift > 63:
            raise IndexError
