"""Count of the fields and elements of a serialized protobuf message, before the message is decoded.

Reason: a small message can become very many objects; a list of empty messages becomes one object for every two bytes.
The scan reads tags, skips texts and packed numbers, and stops once a bound is exceeded. Malformed messages are left to
protobuf, which reports the error.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Final

from google.protobuf.descriptor import FieldDescriptor

BYTES_PER_ELEMENT: Final = 32
"""Bytes of packed numbers that count as one element if the scan does not count the numbers one by one."""
MAX_HEAD_FIELDS: Final = 64
_LOW_BYTES: Final = bytes(range(128))
_NUMBERS: Final = frozenset(
    (FieldDescriptor.TYPE_INT32, FieldDescriptor.TYPE_INT64, FieldDescriptor.TYPE_UINT32, FieldDescriptor.TYPE_UINT64)
)


@dataclass(slots=True)
class _Layout:
    """The fields of a message type: names by field number, layouts of nested messages by field number, and the field
    numbers of packed fields."""

    names: dict[int, str] = field(default_factory=dict)
    nested: dict[int, _Layout] = field(default_factory=dict)
    packed: set[int] = field(default_factory=set)


_layouts: dict[str, _Layout] = {}


def _layout(descriptor: Any) -> _Layout:
    known = _layouts.get(descriptor.full_name)
    if known is None:
        known = _layouts[descriptor.full_name] = _Layout()
        for field_ in descriptor.fields:
            known.names[field_.number] = field_.name
            if field_.message_type is not None:
                known.nested[field_.number] = _layout(field_.message_type)
            elif field_.is_repeated and field_.type in _NUMBERS:
                known.packed.add(field_.number)
    return known


@dataclass(frozen=True, slots=True)
class Scanned:
    """Result of the scan of a message: the numbers of its elements and of its numeric values.

    `field`: the top-level field at which the scan ended because a bound was exceeded; "" if no bound was exceeded.
    """

    elements: int
    numbers: int = 0
    field: str = ""


def scan(
    descriptor: Any, data: bytes | bytearray, most: int, *, members: int = 0, count_numbers: bool = False
) -> Scanned:
    """Count the fields and list elements of a message at all levels of nesting.

    The scan ends once it has counted more than `most` fields and elements in all, or more than `members` elements of
    one top-level field. `count_numbers`: whether packed numbers are counted one by one, separately from the elements.
    If not, BYTES_PER_ELEMENT bytes of packed numbers count as one element.
    """
    state = _Scan(data, most, members or most, count_numbers)
    layout = _layout(descriptor)
    try:
        state.run(layout)
    except IndexError:  # the data ends within a field
        return Scanned(state.elements, state.numbers)
    return Scanned(state.elements, state.numbers, layout.names.get(state.full, "request") if state.full else "")


class _Scan:
    def __init__(self, data: bytes | bytearray, most: int, members: int, count_numbers: bool) -> None:
        self._data = data
        self._most = most
        self._members = members
        self._count_numbers = count_numbers
        self.elements = 0
        self.numbers = 0
        self.full = 0
        """Field number of the top-level field at which a bound was exceeded; 0 if none was exceeded."""

    def run(self, layout: _Layout) -> None:
        """Scan the message. Raises IndexError if a field is malformed or cut off. Tags and lengths of one byte are read
        inline, for speed."""
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
            else:  # the end of a group that has not begun, or an undefined wire type
                raise IndexError
        self.full = top

    def _group(self, at: int, end: int) -> int:
        """Count the fields of a group, an old form of nested message that protobuf decodes as an unknown field. Returns
        the offset of the end of the group. Raises IndexError if the group is malformed or cut off."""
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
            self.elements += length // BYTES_PER_ELEMENT


def read_varint(data: bytes | bytearray, at: int) -> tuple[int, int]:
    """Return the number that starts at the offset `at`, and the offset after the number. Raises IndexError if the data
    ends within the number."""
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


def started_call(data: bytes | bytearray) -> int | None:
    """Return the call id of a session's message that starts one call and nothing else; None for any other message, and
    if the id is not among the first MAX_HEAD_FIELDS fields of the start."""
    try:
        if data[0] != 0x0A:  # SessionRequest.start, the first field of its message
            return None
        length, at = read_varint(data, 1)
        if at + length != len(data):
            return None
        for _ in range(MAX_HEAD_FIELDS):
            tag, at = read_varint(data, at)
            if tag == 0x08:  # SessionStart.call_id
                return read_varint(data, at)[0] & 0xFFFF_FFFF_FFFF_FFFF
            if tag & 7 == 2:
                length, at = read_varint(data, at)
                at += length
            elif tag & 7 == 0:
                _, at = read_varint(data, at)
            else:
                return None
    except (IndexError, ValueError):  # the data ends within a field
        pass
    return None
