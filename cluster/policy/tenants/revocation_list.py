"""Revoked certificates: a list of serial numbers, one on each line. Each serial number is revoked for one issuer or for
any issuer.

    # serial in hexadecimal   issuer (RFC 4514), empty for any   note
    4F:A0:11:C9               CN=headrace link authority         worker that was stolen

Serial numbers are unique only within an issuer. Columns are separated by tabs. A line that was typed by hand may
contain just the serial number, as `openssl x509 -serial` prints it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Self

MAX_SERIAL_DIGITS = 64
"""Maximum number of hex digits of a serial number. RFC 5280 allows 20 bytes; some issuers use more."""
_SERIAL = re.compile(r"(?:serial=)?(?:0x)?([0-9a-fA-F]+)", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Revocation:
    """A revoked certificate. An empty `issuer` matches any issuer."""

    serial: int
    issuer: str = ""
    note: str = ""

    def line(self) -> str:
        """Return the entry as a line of the file."""
        return "\t".join((f"{self.serial:X}", self.issuer, self.note)).rstrip("\t")


@dataclass(frozen=True, slots=True)
class RevocationList:
    """The revoked certificates of one list."""

    entries: tuple[Revocation, ...] = ()
    _serials: frozenset[tuple[int, str]] = field(default=frozenset(), repr=False)

    @classmethod
    def of(cls, entries: Iterable[Revocation]) -> Self:
        """Build a list from entries in any order."""
        every = tuple(entries)
        return cls(every, frozenset((entry.serial, entry.issuer) for entry in every))

    @classmethod
    def parse(cls, text: str) -> Self:
        """Parse the text of a file. Raises ValueError with the number of the first invalid line."""
        entries = []
        for number, line in enumerate(text.splitlines(), start=1):
            if line.strip() and not line.lstrip().startswith("#"):
                entries.append(_entry(line, number))
        return cls.of(entries)

    def __bool__(self) -> bool:
        """Whether any certificate is revoked."""
        return bool(self.entries)

    def has(self, serial: int, issuer: str) -> bool:
        """Whether the certificate with this serial number and issuer is revoked."""
        return (serial, issuer) in self._serials or (serial, "") in self._serials


def serial_of(text: str) -> int:
    """Parse a serial number in hexadecimal, with optional colons and an optional prefix 0x or `serial=`.

    Raises ValueError for other text.
    """
    match = _SERIAL.fullmatch(text.strip().replace(":", ""))
    if match is None or len(match[1]) > MAX_SERIAL_DIGITS:
        raise ValueError(f"{text.strip()[:80]!r} is no serial number in hexadecimal")
    return int(match[1], 16)


def _entry(line: str, number: int) -> Revocation:
    serial, issuer, note, *more = (*(part.strip() for part in line.split("\t")), "", "")
    if any(more):
        raise ValueError(f"line {number}: more than three columns (serial, issuer, note; separated by tabs)")
    try:
        return Revocation(serial_of(serial), issuer, note)
    except ValueError as error:
        raise ValueError(f"line {number}: {error}") from None
