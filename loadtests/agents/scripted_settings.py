"""Settings of scripted_core.py. This module imports nothing of vLLM, so that any process can read them."""

from __future__ import annotations

from typing import Final

EXECUTOR: Final = "loadtests.agents.scripted_core.ScriptedExecutor"
IN_CORE: Final = {"HEADRACE_ENGINE_RANK": "process"}
"""Environment with which Headrace's worker uses the executor that its engine arguments name. Without this environment,
a worker on CPUs uses another executor."""
SCRIPTS, STEP_MS = "LOADTEST_SCRIPTS", "LOADTEST_STEP_MS"
"""Environment variables: path of the scripts (JSON: token ids by key), and duration of a step in milliseconds."""
PLAIN_TOKEN: Final = 1000
