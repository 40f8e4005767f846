"""Order of tests in parallel processes: tests with engines, Ray or namespaces run in one process, all other tests file
by file.

A small machine holds at most two engines at a time, and the tests of a file share fixtures.
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
    """Return the group of tests to which a file belongs. The tests of a group run one after the
    other in one process.
    """
    return "engines" if _HEAVY.search((ROOT / file).read_text()) else file


class Scheduler(LoadScopeScheduling):  # type: ignore[misc] # xdist's classes are untyped
    """Scheduler of pytest-xdist that distributes groups of tests, the largest group first."""

    def _split_scope(self, nodeid: str) -> str:
        return scope(nodeid.partition("::")[0])
