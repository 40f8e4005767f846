"""The descriptors that a process may have."""

from __future__ import annotations

import resource
from typing import Final

ENOUGH: Final = 1 << 20
"""Where the hard limit is none: what systems commonly set."""


def raise_descriptor_limit() -> int:
    """Raise the soft limit to the hard one; the limit that holds now. Shells and container runtimes often set a soft
    limit of 1,024 for programs that use select()."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = ENOUGH if hard == resource.RLIM_INFINITY else hard
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    return wanted
