"""Core dumps of a process and its children are disabled."""

from __future__ import annotations

import subprocess
import sys

PROGRAM = """
import resource, subprocess, sys
from cluster.process.core_dumps import disable_core_dumps
before = resource.getrlimit(resource.RLIMIT_CORE)
disable_core_dumps()
child = "import resource; print(resource.getrlimit(resource.RLIMIT_CORE)[0])"
print(before[1] == resource.getrlimit(resource.RLIMIT_CORE)[1], resource.getrlimit(resource.RLIMIT_CORE)[0], flush=True)
subprocess.run([sys.executable, "-c", child], check=True)
"""


def test_no_core_dump_of_a_process_and_its_children() -> None:
    """For a process and its child, the soft limit for core dumps is 0. The hard limit is unchanged."""
    output = subprocess.run([sys.executable, "-c", PROGRAM], check=True, capture_output=True, text=True).stdout
    assert output.split() == ["True", "0", "0"]
