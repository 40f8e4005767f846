"""The limit on open file descriptors of a process is raised. The test runs in a separate process."""

from __future__ import annotations

import subprocess
import sys

PROGRAM = """
import resource
_, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
wanted = min(hard, 4096)
resource.setrlimit(resource.RLIMIT_NOFILE, (64, wanted))
from cluster.process.descriptors import raise_descriptor_limit
assert raise_descriptor_limit() == wanted
assert resource.getrlimit(resource.RLIMIT_NOFILE) == (wanted, wanted)
assert raise_descriptor_limit() == wanted
"""


def test_the_soft_limit_becomes_the_hard_one() -> None:
    """The soft limit on descriptors is raised to the hard limit. A second call changes nothing."""
    subprocess.run([sys.executable, "-c", PROGRAM], check=True)
