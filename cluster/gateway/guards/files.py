"""Pattern files of guards. A pattern file has a line `name: expression` for each pattern. The file is reloaded when it
changes.

If a changed file is invalid, the last valid patterns stay in force and an error is logged. For a file that has never
been valid, `get` raises PatternError; the guard then fails open or closed, as its setting `fail` says.
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
    """The pattern files that tenant policies name, keyed by path."""

    def __init__(self) -> None:
        self._known: dict[str, tuple[Stamp | None, Patterns | PatternError]] = {}

    def get(self, path: str) -> Patterns:
        """Return the current patterns of a file. Raises PatternError."""
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
            log.error("guard.patterns_not_read", error=str(error), kept=isinstance(before, Patterns))
            return before if isinstance(before, Patterns) else error
        log.info("guard.patterns_read", file=path, patterns=len(patterns.names))
        return patterns


def read_patterns(path: str) -> Patterns:
    """Read the patterns of a file. Raises PatternError, which names the file and says what is wrong."""
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
        raise PatternError("", f"{path} is not YAML") from None  # its content must not reach the log
    for duplicate in document.duplicates:
        raise PatternError(
            "", f"{path} has the same name in lines {duplicate.first_line} and {duplicate.line}: remove one"
        )
    content = document.data
    if not isinstance(content, dict):
        raise PatternError("", f"{path} must hold lines of name: 'expression'")
    try:
        return Patterns(content)
    except PatternError as error:
        raise PatternError("", f"{path}: {error}") from None


def _stamp(path: str) -> Stamp | None:
    try:
        status = Path(path).stat()
    except OSError:
        return None
    return (status.st_ino, status.st_mtime_ns, status.st_size)
