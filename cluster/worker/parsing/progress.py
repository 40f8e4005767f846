"""The session on which a parser process works, recorded in memory that the process shares with its worker.

When a parse hangs or the process ends, the worker must find out at which request. The process itself can then no longer
report this. So the process records each session before it works on the session.
"""

from __future__ import annotations

import mmap
import os
import struct

_FIELDS = struct.Struct("<QQ")
NONE = 0
"""Session number that means no session."""


class ParserProgress:
    """Shared memory in which a parser process notes the session that it works on, so that the worker can read it.

    The memory also holds a counter that the process increases with each note. Only the parser process writes to the
    memory.
    """

    def __init__(self, descriptor: int) -> None:
        """Map the memory that `descriptor` refers to, and close the descriptor."""
        self._memory = mmap.mmap(descriptor, _FIELDS.size)
        os.close(descriptor)
        self._count = 0

    def record(self, session: int) -> None:
        """Record that the work on a session begins, or that the process works on no session (`session` is NONE)."""
        self._count += 1
        _FIELDS.pack_into(self._memory, 0, session, self._count)

    def read(self) -> tuple[int, int]:
        """Return the current session and the number of records so far."""
        session, count = _FIELDS.unpack_from(self._memory)
        return int(session), int(count)


def new_memory() -> int:
    """Create memory for a ParserProgress, and return its descriptor."""
    descriptor = os.memfd_create("headrace-parser", os.MFD_CLOEXEC)
    os.ftruncate(descriptor, _FIELDS.size)
    return descriptor
