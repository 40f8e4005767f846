"""Check whether weights and adapters may be loaded from a source. The setting `weights.allow.sources` lists patterns of
allowed sources.
"""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase


def is_allowed_source(source: str, patterns: Iterable[str]) -> bool:
    """Return whether a source matches any of the patterns.

    A path with the part `..` could lead out of the folder of a pattern such as `/weights/*`. So only the pattern `*`
    matches such a path.
    """
    leads_out = ".." in source.split("/")
    return any(pattern == "*" or (fnmatchcase(source, pattern) and not leads_out) for pattern in patterns)
