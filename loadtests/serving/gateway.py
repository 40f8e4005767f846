"""Program that runs a gateway and measures it in the same process.

    python -m loadtests.serving.gateway --modules FILE -- gateway -f ... --folder ...
    python -m loadtests.serving.gateway --stalls FILE -- gateway -f ... --folder ...

`--modules` runs the command line unchanged and writes the names of all imported modules at the end.

`--stalls` runs the same gateway and samples the event loop every few milliseconds. At every SIGUSR1 the program writes
the worst lateness and the number of tasks.

`--without-metrics` runs the command line with counters and histograms that count nothing. No configuration of a gateway
can switch them off.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import signal
import sys
import time
from array import array
from pathlib import Path

TICK_S = 0.004
BIN_S, BINS = 0.00005, 20_000
"""Width in seconds and number of the histogram bins in which lateness is counted; the last bin is for a second and
more. A list of all values would itself make memory grow.
"""


class Stalls:
    """Lateness of the event loop.

    `cpu_s`: CPU time of the loop's thread during the longest stall. If it is much shorter than the stall,
    another process or thread had the core. `busy_s`: the largest lateness that work in this process can
    explain. Each lateness is limited to the CPU time that the process used meanwhile.
    """

    def __init__(self, path: Path, begins_later: bool = False) -> None:
        """Create the sampler of the event loop's lateness. `path`: file for the measurements. `begins_later`: sampling
        begins at the first SIGUSR1, because it costs a hundredth of a core."""
        self._path = path
        self._begin = asyncio.Event()
        if not begins_later:
            self._begin.set()
        self._worst = (0.0, 0.0)
        self._busy_s = 0.0
        self._late = array("Q", bytes(8 * BINS))

    async def watch(self) -> None:
        """Sample the event loop until cancelled."""
        asyncio.get_running_loop().add_signal_handler(signal.SIGUSR1, self._write_report)
        await self._begin.wait()
        while True:
            due, cpu, used = time.perf_counter() + TICK_S, time.thread_time(), time.process_time()
            await asyncio.sleep(TICK_S)
            late = time.perf_counter() - due
            self._busy_s = max(self._busy_s, min(late, time.process_time() - used))
            self._late[min(int(max(late, 0.0) / BIN_S), BINS - 1)] += 1
            if late > self._worst[0]:
                self._worst = (late, time.thread_time() - cpu)

    def _write_report(self) -> None:
        self._begin.set()
        ticks = sum(self._late)
        figures: dict[str, float] = {
            "worst_s": self._worst[0],
            "cpu_s": self._worst[1],
            "busy_s": self._busy_s,
            "ticks": ticks,
            "tasks": len(asyncio.all_tasks()),
        }
        upto = itertools.accumulate(self._late)
        figures["p99_s"] = next((BIN_S * i for i, count in enumerate(upto) if count > 0.99 * ticks), 0.0)
        scratch = self._path.with_suffix(".new")
        scratch.write_text(json.dumps(figures))
        scratch.rename(self._path)
        self._busy_s = 0.0
        self._worst, self._late = (0.0, 0.0), array("Q", bytes(8 * BINS))


async def watched_gateway(file: Path, folder: Path, ready_file: Path, stalls: Stalls) -> None:
    """Run the gateway as `headrace gateway` does. In the same event loop, `stalls` measures how late the loop is."""
    from cluster.cli.commands.run.processes import stop_on_signal
    from cluster.cli.common import read_config
    from cluster.gateway.server import run_gateway
    from cluster.observe import log
    from cluster.process import memory

    config = read_config(file)
    log.configure(config.observe.log_level, {"cluster": config.name, "part": "gateway"})

    def ready(endpoints: dict[str, str]) -> None:
        memory.freeze_objects()  # as `headrace gateway` does
        ready_file.write_text(json.dumps({"endpoints": endpoints}))

    watch = asyncio.create_task(stalls.watch())
    try:
        await run_gateway(config, folder=folder, stop=stop_on_signal(), ready=ready)
    finally:
        watch.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await watch


def main() -> None:
    """Parse the options before `--`, and run the gateway with the options after `--`."""
    at = sys.argv.index("--")
    parser = argparse.ArgumentParser()
    parser.add_argument("--modules", type=Path)
    parser.add_argument("--stalls", type=Path)
    parser.add_argument("--stalls-later", action="store_true")
    parser.add_argument("--without-metrics", action="store_true")
    wanted = parser.parse_args(sys.argv[1:at])
    rest = sys.argv[at + 1 :]
    if wanted.stalls is not None:
        gateway = argparse.ArgumentParser()
        gateway.add_argument("command")
        gateway.add_argument("-f", type=Path)
        gateway.add_argument("--folder", type=Path)
        gateway.add_argument("--ready-file", type=Path)
        given = gateway.parse_args(rest)
        asyncio.run(
            watched_gateway(given.f, given.folder, given.ready_file, Stalls(wanted.stalls, wanted.stalls_later))
        )
        return
    sys.argv = ["headrace", *rest]
    if wanted.without_metrics:
        turn_metrics_off()
    from cluster.cli.main import main as command_line

    try:
        command_line()
    finally:
        if wanted.modules is not None:
            wanted.modules.write_text(json.dumps(sorted(sys.modules)))


def turn_metrics_off() -> None:
    """Replace the counting methods of counters and histograms by methods that do nothing."""
    from cluster.observe.metrics import Histogram, Metrics

    def count_nothing(*_: object, **__: object) -> None:
        return None

    for owner, name in ((Metrics, "count"), (Histogram, "observe"), (Histogram, "observe_traced")):
        setattr(owner, name, count_nothing)


if __name__ == "__main__":
    main()
