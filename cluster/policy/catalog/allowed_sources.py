"""Check of sources of weights and adapters against the patterns of `weights.allow.sources`."""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase


def is_allowed_source(source: str, patterns: Iterable[str]) -> bool:
    """Return whether a pattern matches a source. Only the pattern `*` matches a source with the part `..`, which could
    lead out of the folder in a pattern such as `/weights/*`."""
    leads_out = ".." in source.split("/")
    return any(pattern == "*" or (fnmatchcase(source, pattern) and not leads_out) for pattern in patterns)
