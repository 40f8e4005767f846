"""Program that runs simulated workers. Each worker has its own process and is restarted when the process dies.

    python -m loadtests.serving.brood --folder DIR --workers FILE [--restart-s 0.2]

FILE holds a JSON list of command lines for loadtests.serving.worker. The program imports everything once and forks each
worker, so that a killed worker is back at once. A real worker takes longer, even with a warm page cache. DIR/i.pid has
the pid of the current process of worker i.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from loadtests.serving import worker


def run_worker(arguments: Sequence[str]) -> NoReturn:
    """Run a worker in the child process until the worker ends, then exit."""
    code = 1
    try:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_DFL)
        asyncio.run(worker.serve(worker.parse(arguments)))
        code = 0
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


class WorkerPool:
    """The parent process of the workers. It has no threads or channels, so that it can fork at any time."""

    def __init__(self, folder: Path, workers: Sequence[Sequence[str]], restart_s: float) -> None:
        self._folder = folder
        self._workers = workers
        self._restart_s = restart_s
        self._living: dict[int, int] = {}

    def start(self, number: int) -> None:
        """Fork worker `number`, and write its pid to a file in the pool's folder."""
        pid = os.fork()
        if pid == 0:
            run_worker(self._workers[number])
        self._living[pid] = number
        scratch = self._folder / f"{number}.new"
        scratch.write_text(str(pid))
        scratch.rename(self._folder / f"{number}.pid")

    def run(self) -> None:
        """Start the workers, and restart each worker that ends, until SIGTERM."""
        signal.signal(signal.SIGTERM, self._stop)
        for number in range(len(self._workers)):
            self.start(number)
        while True:
            pid, _ = os.wait()
            number = self._living.pop(pid)
            time.sleep(self._restart_s)
            self.start(number)

    def _stop(self, *_: object) -> NoReturn:
        for pid in self._living:
            os.kill(pid, signal.SIGKILL)
        os._exit(0)


def main() -> None:
    """Parse the command line and run the workers."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--workers", type=Path, required=True)
    parser.add_argument("--restart-s", type=float, default=0.2)
    given = parser.parse_args()
    WorkerPool(given.folder, json.loads(given.workers.read_text()), given.restart_s).run()


if __name__ == "__main__":
    main()
