"""The session on which a parser process works, in memory that it shares with its worker.

The worker must find out at which request a parse hangs or the process ends. The process itself can then no longer
report the request. So the process records each session before it works on the session.
"""

from __future__ import annotations

import mmap
import os
import struct

_FIELDS = struct.Struct("<QQ")
NONE = 0
"""Session number that means no session."""


class ParserProgress:
    """Memory through which a worker sees on which session its parser process works.

    The memory holds the current session, and a count that increases each time a session is recorded. Only one process
    writes it.
    """

    def __init__(self, descriptor: int) -> None:
        """Map the memory behind `descriptor`, and close the descriptor."""
        self._memory = mmap.mmap(descriptor, _FIELDS.size)
        os.close(descriptor)
        self._count = 0

    def record(self, session: int) -> None:
        """Record that the work on a session begins. `session`: NONE if the process works on no session."""
        self._count += 1
        _FIELDS.pack_into(self._memory, 0, session, self._count)

    def read(self) -> tuple[int, int]:
        """Return the current session and the number of records, which changes with each record."""
        session, count = _FIELDS.unpack_from(self._memory)
        return int(session), int(count)


def new_memory() -> int:
    """Return the descriptor of new memory for a ParserProgress."""
    descriptor = os.memfd_create("headrace-parser", os.MFD_CLOEXEC)
    os.ftruncate(descriptor, _FIELDS.size)
    return descriptor
