"""Distribution of tests over parallel processes.

Tests with engines run in one process, tests with only Ray or network namespaces in another, and other tests file by
file. A small machine has room for at most two engines at a time, and the tests of a file share fixtures.
"""

from __future__ import annotations

import functools
import re
from pathlib import Path
from typing import Any

from xdist.scheduler import LoadScopeScheduling

ROOT = Path(__file__).resolve().parents[2]
_ENGINE = re.compile(r"pytest\.mark\.engine\b")
_CLUSTER = re.compile(r"pytest\.mark\.(ray|root)\b")


@functools.cache
def scope(file: str) -> str:
    """Return the name of the group to which the tests of a file belong.

    The tests of a group run in one process, one after the other.
    """
    text = (ROOT / file).read_text()
    return "engines" if _ENGINE.search(text) else "clusters" if _CLUSTER.search(text) else file


class Scheduler(LoadScopeScheduling):  # type: ignore[misc] # xdist's classes are untyped
    """Scheduler of pytest-xdist that distributes groups of tests.

    Groups with engines and clusters come first, since they take longest. The other groups follow, the largest first.
    """

    def remove_node(self, node: Any) -> str | None:
        """Remove a test process. If it has crashed, return the test that ran there.

        The finished groups of tests of this process are dropped first. Otherwise xdist would hand them to other
        processes, which would then wait for tests forever.
        """
        work = self.assigned_work[node]
        for finished in [group for group, tests in work.items() if all(tests.values())]:
            del work[finished]
        crashed: str | None = super().remove_node(node)
        return crashed

    def _split_scope(self, nodeid: str) -> str:
        return scope(nodeid.partition("::")[0])

    def _assign_work_unit(self, node: Any) -> None:
        for group in ("clusters", "engines"):
            if group in self.workqueue:
                self.workqueue.move_to_end(group, last=False)
        super()._assign_work_unit(node)
