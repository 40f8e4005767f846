"""Program that runs one worker of the part `clients`: python -m loadtests.agents.client_tasks.worker FILE

FILE is JSON with the keys that loadtests.agents.worker takes, and four more: `pace_s`, `deaths` (a file), `log`
(a file) and `folder`. PacedEngine describes these.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cluster.api.ports import Engine
from cluster.worker.engine.processes import fork_server
from loadtests.agents.client_tasks.engine import PacedEngine, TurnScripts
from loadtests.agents.client_tasks.prepare import MAX_MODEL_TOKENS
from loadtests.agents.scripted import PromptLog
from loadtests.agents.worker import serve


def main(given: Mapping[str, Any]) -> None:
    """Run the worker until SIGTERM, or until the engine kills this process. `given`: the contents of the JSON file that
    the command line names."""

    def engine_of(model: Mapping[str, Any], seed: int, _: PromptLog) -> Engine:
        return PacedEngine(
            TurnScripts.read(Path(model["folder"]), Path(model["scripts"])),
            pace_s=given["pace_s"],
            log=Path(given["log"]),
            deaths=json.loads(Path(given["deaths"]).read_text()),
            folder=Path(given["folder"]),
            seed=seed,
            max_model_len=MAX_MODEL_TOKENS,
        )

    asyncio.run(serve(given, engine_of))


if __name__ == "__main__":
    fork_server.start()
    main(json.loads(Path(sys.argv[1]).read_text()))
