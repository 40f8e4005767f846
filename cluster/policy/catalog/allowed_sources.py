"""Which sources of weights and adapters the patterns of `weights.allow.sources` allow."""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase


def is_allowed_source(source: str, patterns: Iterable[str]) -> bool:
    """Return whether a pattern matches a source. A source with the part `..` leads out of the folder that a pattern
    such as `/weights/*` means, so only the pattern `*` matches it."""
    leads_out = ".." in source.split("/")
    return any(pattern == "*" or (fnmatchcase(source, pattern) and not leads_out) for pattern in patterns)
