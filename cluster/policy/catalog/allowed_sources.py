"""Check of sources of weights and adapters against the patterns of `weights.allow.sources`."""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase


def is_allowed_source(source: str, patterns: Iterable[str]) -> bool:
    """Return whether a pattern matches a source. A source with the part `..` could lead out of the folder of a pattern
    such as `/weights/*`, so only the pattern `*` matches such a source."""
    leads_out = ".." in source.split("/")
    return any(pattern == "*" or (fnmatchcase(source, pattern) and not leads_out) for pattern in patterns)
