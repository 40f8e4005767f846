"""Setting that disables core dumps: the memory of a process contains prompts, which must not be written to disk."""

from __future__ import annotations

import resource


def disable_core_dumps() -> None:
    """Disable core dumps for this process and its children. The hard limit stays, so that an operator can raise the
    soft limit with `prlimit --core`."""
    _, hard = resource.getrlimit(resource.RLIMIT_CORE)
    resource.setrlimit(resource.RLIMIT_CORE, (0, hard))
