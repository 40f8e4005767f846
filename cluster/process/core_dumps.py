"""What a crash leaves behind: no image of a process's memory, since prompts are in it."""

from __future__ import annotations

import resource


def leave_no_core_dumps() -> None:
    """For this process and its children. The hard limit stays, so that an operator who needs one can raise it with
    `prlimit --core`."""
    _, hard = resource.getrlimit(resource.RLIMIT_CORE)
    resource.setrlimit(resource.RLIMIT_CORE, (0, hard))
