"""Program that runs a real engine until it is killed. Arguments: model folder, tensor parallel size.

The program prints `ready` once the engine has answered a request, then keeps one request running.
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

from cluster.worker.engine.vllm.engine import VllmEngine
from tests.worker.engine.conftest import TOKEN_HI, TOKEN_LO, tiny_spec
from tests.worker.engine.contract import Driver, Subject, request


async def main(folder: Path, tensor_parallel_size: int) -> None:
    """Start the engine, print the answer to one request, then run requests for ever."""
    engine = VllmEngine(tiny_spec(tensor_parallel_size=tensor_parallel_size), folder, executor="mp")
    info = await engine.start()
    subject = Subject(engine, info, TOKEN_LO, TOKEN_HI)
    driver = Driver(subject)
    (answer,) = await driver.run(request(subject.prompt(1), max_tokens=8))
    print("ready", info.engine_class, *answer.token_ids, flush=True)
    while True:
        await driver.run(request(subject.prompt(2), max_tokens=500))


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1]), int(sys.argv[2])))
