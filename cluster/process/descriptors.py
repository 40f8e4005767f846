"""The limit on the number of file descriptors of a process."""

from __future__ import annotations

import resource
from typing import Final

DEFAULT_LIMIT: Final = 1 << 20
"""Limit that is set if the hard limit is infinite: a common system maximum."""


def raise_descriptor_limit() -> int:
    """Raise the soft limit to the hard limit and return the new limit. Shells and container runtimes often set a soft
    limit of 1,024 for programs that use select()."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = DEFAULT_LIMIT if hard == resource.RLIM_INFINITY else hard
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    return wanted
