"""Order of tests in parallel processes: those with engines, Ray or namespaces in one, the others file by file.

A small machine holds at most two engines at a time, and a file's tests share its fixtures.
"""

from __future__ import annotations

import functools
import re
from pathlib import Path

from xdist.scheduler import LoadScopeScheduling

ROOT = Path(__file__).resolve().parents[2]
_HEAVY = re.compile(r"pytest\.mark\.(engine|ray|root)\b")


@functools.cache
def scope(file: str) -> str:
    """The group of tests that a file belongs to; tests of a group run one after the other in one process."""
    return "engines" if _HEAVY.search((ROOT / file).read_text()) else file


class Scheduler(LoadScopeScheduling):  # type: ignore[misc] # xdist's classes are untyped
    """pytest-xdist's scheduler by groups, the largest group first."""

    def _split_scope(self, nodeid: str) -> str:
        return scope(nodeid.partition("::")[0])
