"""The parts of a support bundle, before redaction, and limits on their size and on the time to collect them."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

MAX_PART_BYTES = 8 << 20
MAX_BUNDLE_BYTES = 64 << 20
"""Maximum size of one part, and maximum size of all parts together, in bytes before compression."""


class LeftOut(Exception):
    """Error for a part of the support bundle that cannot be collected, or can be collected only partly. The message is
    the reason that the manifest shows."""


@dataclass
class Parts:
    """The files of a support bundle that were collected so far.

    `deadline_s`: time of `clock` after which nothing more is collected. `left_out`: the reason for each file
    that was left out, by file name.
    """

    deadline_s: float
    clock: Callable[[], float] = time.monotonic
    documents: dict[str, Any] = field(default_factory=dict)
    """JSON documents by file name."""
    texts: dict[str, str] = field(default_factory=dict)
    """Texts by file name."""
    left_out: dict[str, str] = field(default_factory=dict)

    def seconds_left(self, most_s: float) -> float:
        """Return the seconds that one step may take, at most `most_s`. Raises LeftOut if no time is left."""
        left_s = self.deadline_s - self.clock()
        if left_s <= 0:
            raise LeftOut("no time was left")
        return min(most_s, left_s)

    def document(self, name: str, collect: Callable[[], Any]) -> Any:
        """Store and return the JSON document that `collect` returns. If `collect` raises LeftOut, store the reason and
        return None."""
        found = self._collected(name, collect)
        if found is not None:
            self.documents[name] = found
        return found

    def text(self, name: str, collect: Callable[[], str]) -> None:
        """Store the text that `collect` returns. If `collect` raises LeftOut, store the reason."""
        found = self._collected(name, collect)
        if found is not None:
            self.texts[name] = found

    def _collected(self, name: str, collect: Callable[[], Any]) -> Any:
        try:
            self.seconds_left(0.0)
            return collect()
        except LeftOut as reason:
            self.left_out[name] = str(reason)
            return None


def as_text(document: Any) -> str:
    """Return a JSON document as text. Values of types unknown to JSON are written as strings."""
    return json.dumps(document, indent=1, ensure_ascii=False, default=str) + "\n"


def cut(text: str, most_bytes: int) -> tuple[bytes, bool]:
    """Return the last whole lines of a text that fit into a number of bytes, and whether lines were cut off."""
    data = text.encode("utf-8", "backslashreplace")
    if len(data) <= most_bytes:
        return data, False
    return data[len(data) - most_bytes :].partition(b"\n")[2], True


def event_lines(lines: Iterable[str], events: Mapping[str, str], most: int) -> tuple[list[dict[str, Any]], int]:
    """Return the newest log lines that are events of Headrace, at most `most`, and the number of all other lines.

    The other lines may be another program's output and contain secrets. Tracebacks are removed from the events, because
    they may quote values.
    """
    found: list[dict[str, Any]] = []
    others = 0
    for line in lines:
        try:
            value = json.loads(line)
        except ValueError:
            value = None
        if not isinstance(value, dict) or value.get("event") not in events:
            others += bool(line.strip())
            continue
        found.append({key: item for key, item in value.items() if key not in ("exception", "stack")})
    return found[-most:], others
