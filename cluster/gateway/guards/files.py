"""Files of patterns, `name: expression` each, that are read again when they change.

A file that has become wrong leaves the last good patterns in force and says so in the log; one that never was right
raises, and then the guard fails as its `fail` says.
"""

from __future__ import annotations

from pathlib import Path

import structlog

from cluster.config.yaml_reader import NotYaml, read
from cluster.policy.tenants.patterns import PatternError, Patterns

log = structlog.get_logger("guards")

MAX_FILE_BYTES = 1_000_000
Stamp = tuple[int, int, int]


class PatternFiles:
    """Every file that a policy has named, by its path."""

    def __init__(self) -> None:
        self._known: dict[str, tuple[Stamp | None, Patterns | PatternError]] = {}

    def get(self, path: str) -> Patterns:
        """A file's patterns, as it is now. Raises PatternError."""
        stamp = _stamp(path)
        known = self._known.get(path)
        if known is None or known[0] != stamp:
            known = self._known[path] = (stamp, self._read(path, None if known is None else known[1]))
        if isinstance(known[1], PatternError):
            raise PatternError("", known[1].remedy)
        return known[1]

    def _read(self, path: str, before: Patterns | PatternError | None) -> Patterns | PatternError:
        try:
            patterns = read_patterns(path)
        except PatternError as error:
            log.error("patterns_not_read", error=str(error), kept=isinstance(before, Patterns))
            return before if isinstance(before, Patterns) else error
        log.info("patterns_read", file=path, patterns=len(patterns.names))
        return patterns


def read_patterns(path: str) -> Patterns:
    """The patterns of a file. Raises PatternError that names the file and what is wrong in it."""
    try:
        with Path(path).open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise PatternError("", f"{path} cannot be read: {error.strerror}") from None
    if len(data) > MAX_FILE_BYTES:
        raise PatternError("", f"{path} has more than {MAX_FILE_BYTES} bytes")
    try:
        document = read(data.decode())
    except (NotYaml, UnicodeDecodeError):
        raise PatternError("", f"{path} is not YAML") from None  # what it is instead is not for a log
    for twice in document.duplicates:
        raise PatternError("", f"{path} has one name twice, in lines {twice.first_line} and {twice.line}: remove one")
    content = document.data
    if not isinstance(content, dict):
        raise PatternError("", f"{path} must hold lines of name: 'expression'")
    try:
        return Patterns(content)
    except PatternError as error:
        raise PatternError("", f"{path}: {error}") from None


def _stamp(path: str) -> Stamp | None:
    try:
        found = Path(path).stat()
    except OSError:
        return None
    return (found.st_ino, found.st_mtime_ns, found.st_size)
