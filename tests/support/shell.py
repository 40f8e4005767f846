"""The command line as a user runs it: in a separate process."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

from cluster.cli.commands.operate.status import HURTS_CALLERS


def headrace(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run one command to the end and return its result."""
    command = [sys.executable, "-m", "cluster.cli.main", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=300, stdin=subprocess.DEVNULL)


def until(condition: Callable[[], Any], what: str, deadline_s: float = 240.0) -> Any:
    """Wait until `condition` returns a true value, and return this value. Raises AssertionError after `deadline_s`."""
    end = time.monotonic() + deadline_s
    while time.monotonic() < end:
        value = condition()
        if value:
            return value
        time.sleep(0.05)
    raise AssertionError(f"not within {deadline_s:g} s: {what}")


def status() -> Any:
    """Return the JSON that `headrace status` prints. Repeats the command while a busy gateway misses its deadline."""

    def printed() -> str:
        done = headrace("status", "--json")
        assert done.returncode in (0, HURTS_CALLERS) or "DEADLINE_EXCEEDED" in done.stderr, done.stderr
        return done.stdout if done.returncode in (0, HURTS_CALLERS) else ""

    return json.loads(until(printed, "the gateway answers in time"))
