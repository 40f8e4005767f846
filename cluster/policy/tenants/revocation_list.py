"""Revoked certificates: a list of serial numbers, one a line, each counted for one issuer or for any.

    # serial in hexadecimal   issuer (RFC 4514), empty for any   note
    4F:A0:11:C9               CN=headrace link authority         worker that was stolen

Serial numbers are unique within an issuer only. Columns are separated by tabs; a line that is typed by hand may hold
nothing but the serial, as `openssl x509 -serial` prints it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Self

MAX_SERIAL_DIGITS = 64
"""RFC 5280 allows 20 bytes; some issuers use more."""
_SERIAL = re.compile(r"(?:serial=)?(?:0x)?([0-9a-fA-F]+)", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Revocation:
    """One revoked certificate. `issuer` "": of whichever authority."""

    serial: int
    issuer: str = ""
    note: str = ""

    def line(self) -> str:
        """As it stands in the file."""
        return "\t".join((f"{self.serial:X}", self.issuer, self.note)).rstrip("\t")


@dataclass(frozen=True, slots=True)
class Revoked:
    """The certificates of one list."""

    entries: tuple[Revocation, ...] = ()
    _found: frozenset[tuple[int, str]] = field(default=frozenset(), repr=False)

    @classmethod
    def of(cls, entries: Iterable[Revocation]) -> Self:
        """From entries in any order."""
        every = tuple(entries)
        return cls(every, frozenset((one.serial, one.issuer) for one in every))

    @classmethod
    def parse(cls, text: str) -> Self:
        """From a file's text. Raises ValueError that names the line."""
        entries = []
        for number, line in enumerate(text.splitlines(), start=1):
            if line.strip() and not line.lstrip().startswith("#"):
                entries.append(_entry(line, number))
        return cls.of(entries)

    def __bool__(self) -> bool:
        """Whether any certificate is revoked."""
        return bool(self.entries)

    def has(self, serial: int, issuer: str) -> bool:
        """Whether this certificate is revoked."""
        return (serial, issuer) in self._found or (serial, "") in self._found


def serial_of(text: str) -> int:
    """A serial number as people write it: hexadecimal, with colons, 0x or `serial=`. Raises ValueError."""
    found = _SERIAL.fullmatch(text.strip().replace(":", ""))
    if found is None or len(found[1]) > MAX_SERIAL_DIGITS:
        raise ValueError(f"{text.strip()[:80]!r} is no serial number in hexadecimal")
    return int(found[1], 16)


def _entry(line: str, number: int) -> Revocation:
    serial, issuer, note, *more = (*(part.strip() for part in line.split("\t")), "", "")
    if any(more):
        raise ValueError(f"line {number}: more than three columns (serial, issuer, note; separated by tabs)")
    try:
        return Revocation(serial_of(serial), issuer, note)
    except ValueError as error:
        raise ValueError(f"line {number}: {error}") from None
