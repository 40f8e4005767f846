"""Run tests on vLLM's V2 model runner with asynchronous scheduling. Triton's interpreter runs the kernels, on CPUs.

python -m loadtests.interpreted tests/worker/engine/v2_contract.py
python -m loadtests.interpreted --v1 tests/worker/engine/async_contract.py

`--v1`: the V1 model runner with asynchronous scheduling. All other arguments go to pytest.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from loadtests.interpreted import environment


def main(arguments: Sequence[str]) -> None:
    """Replace this process by pytest in the environment of the interpreted runner."""
    v1 = arguments[:1] == ["--v1"]
    command = [sys.executable, "-m", "pytest", *arguments[v1:]]
    os.execve(sys.executable, command, {**os.environ, **environment(v2=not v1)})  # noqa: S606


if __name__ == "__main__":
    main(sys.argv[1:])
