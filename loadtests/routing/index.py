"""Load test of the gateway's cache index (the part `index`), with a thousand workers and ten million pairs of
block and worker.

`python -m loadtests.routing.index` runs this part alone. Times of the index are CPU times of the thread
that uses it, since other programs run on the same machine. The index is compared with two others (the
peers): a dict of sets, and the index of Dynamo's router through its Python binding. Each peer runs in its
own process with fewer pairs.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import subprocess
import sys
import time
from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from cluster.api.types import KV_EVENTS, EngineInfo, WorkerIdentity
from cluster.gateway.scheduling.worker_caches import WorkerCaches
from cluster.policy.kv_cache.changes import KvChange
from cluster.policy.kv_cache.index import CacheIndex
from cluster.policy.kv_cache.prefix_hashes import Hashes, prefix_hashes
from cluster.policy.kv_cache.prompt_hashes import PromptHashes
from cluster.process.memory import freeze_objects
from cluster.wire.codecs.kv_codec import kv_blocks_to_pb
from loadtests.figures import Bound, Figure, missing
from loadtests.scenarios.common import Stage
from loadtests.scenarios.parts import exact

WORKERS, PAIRS, PEER_PAIRS = 1000, 10_000_000, 1_000_000
BLOCK = 16
SHORT, LONG = 250, 8000
SHARED_PROMPTS = 500
"""Number of prompts that several workers hold. A quarter of each worker's prompts are chosen from these."""
BATCH = 1024
"""Number of blocks that are stored at once, as in a worker's messages."""
TURN_TOKENS = 500

BYTES = "index: bytes for each pair of block and worker"
MATCH_SHORT, MATCH_LONG = "index: match of 250 blocks, p99", "index: match of 8,000 blocks, p99"
HASHED_SHORT = "index: hashing from scratch and match of 250 blocks, p99"
HASHED_LONG = "index: hashing from scratch and match of 8,000 blocks, p99"
GROWN = "index: blocks hashed of growing conversations, against new blocks"
INGEST = "index: millions of blocks stored in a second, in batches"
STALL = "index: longest stall of the event loop at 100,000 blocks/s"
DICT_BYTES, DICT_MATCH = "dict of sets: bytes for each pair", "dict of sets: match of 250 blocks, p99"
DYNAMO_BYTES, DYNAMO_MATCH = "Dynamo's index: bytes for each pair", "Dynamo's index: match of 250 blocks, p99"
ROWS: Mapping[str, Bound | None] = {
    BYTES: Bound("<=", 32.0),
    MATCH_SHORT: Bound("<=", 60.0),
    MATCH_LONG: Bound("<=", 300.0),
    HASHED_SHORT: Bound("<=", 150.0),
    HASHED_LONG: Bound("<=", 1200.0),
    GROWN: Bound("<=", 1.02),
    INGEST: Bound(">=", 1.5),
    STALL: Bound("<=", 2.0),
    DICT_BYTES: None,
    DICT_MATCH: None,
    DYNAMO_BYTES: None,
    DYNAMO_MATCH: None,
}
PEERS = {"dict": (DICT_BYTES, DICT_MATCH), "dynamo": (DYNAMO_BYTES, DYNAMO_MATCH)}
PEER_S = 600.0


@dataclass(frozen=True, slots=True)
class Times:
    """Times of one operation in microseconds."""

    p50: float
    p99: float

    @property
    def note(self) -> str:
        """The median as text, for the note of a row whose value is the p99."""
        return f"median {self.p50:.0f} us"


def timed(work: Callable[[int], object], count: int) -> Times:
    """Return the CPU times of the calls `work(0)` to `work(count - 1)`."""
    took = []
    for number in range(count):
        begun = time.thread_time()
        work(number)
        took.append(time.thread_time() - begun)
    p50, p99 = np.percentile(took, (50, 99)) * 1e6
    return Times(float(p50), float(p99))


class Filled:
    """A cache index that is filled with random blocks of all workers. Several workers hold the same shared prompts."""

    def __init__(self, seed: int, workers: int, pairs: int) -> None:
        self._rng = np.random.default_rng(seed)
        self.index = CacheIndex(1 << 24, int(self._rng.integers(1 << 63)))
        self.prompts: list[Hashes] = []
        self.stored = 0
        self.store_s = 0.0
        shared = [self.prompt(SHORT) for _ in range(SHARED_PROMPTS)]
        for number in range(workers):
            self.index.add_worker(f"w{number}")
            whole = max(pairs // workers // SHORT, 1)
            own = [self.prompt(SHORT) for _ in range(whole - whole // 4)]
            chosen = self._rng.choice(SHARED_PROMPTS, whole // 4, replace=False)
            held = own + [shared[at] for at in chosen.tolist()]
            self.prompts += held
            self.store(f"w{number}", np.concatenate(held))

    def prompt(self, blocks: int) -> Hashes:
        """Return the prefix hashes of a random prompt."""
        return prefix_hashes(self._rng.integers(0, 1 << 31, blocks, np.uint32), 1, int(self._rng.integers(1 << 62)))

    def token_ids(self, blocks: int) -> array[int]:
        """Return the token ids of a random prompt of `blocks` whole KV blocks."""
        return array("I", self._rng.integers(0, 128_000, blocks * BLOCK, np.uint32).tobytes())

    def store(self, worker: str, hashes: Hashes) -> None:
        """Store blocks in batches."""
        for at in range(0, len(hashes), BATCH):
            begun = time.thread_time()
            self.index.store(worker, hashes[at : at + BATCH])
            self.store_s += time.thread_time() - begun
        self.stored += len(hashes)

    def some_prompts(self, count: int) -> Sequence[Hashes]:
        """Return random prompts that workers hold."""
        return [self.prompts[at] for at in self._rng.integers(0, len(self.prompts), count).tolist()]


def run(seed: int = 0, workers: int = WORKERS, pairs: int = PAIRS, calls: int = 4000) -> list[Figure]:
    """Measure the gateway's cache index. Returns the report's rows."""
    filled = Filled(seed, workers, pairs)
    index, bytes_a_pair, rate = filled.index, filled.index.bytes_used / filled.stored, filled.stored / filled.store_s
    texts = {count: [filled.token_ids(count) for _ in range(8)] for count in (SHORT, LONG)}
    for prompts in texts.values():
        for number, ids in enumerate(prompts):
            hashes = prefix_hashes(ids, BLOCK, 0)
            for part in range(8):  # eight workers hold an eighth, two eighths, ... of each
                index.store(f"w{(8 * number + part) % workers}", hashes[: len(hashes) * (part + 1) // 8])
    gc.collect()
    gc.freeze()
    some, longs = filled.some_prompts(calls), [prefix_hashes(ids, BLOCK, 0) for ids in texts[LONG]]
    short = timed(lambda number: index.match(some[number]), calls)
    long = timed(lambda number: index.match(longs[number % 8]), calls // 4)
    hashed = {count: timed(partial(_hash_and_match, index, prompts), calls // 4) for count, prompts in texts.items()}
    stall_ms = asyncio.run(longest_stall_ms(seed))
    gc.unfreeze()
    note = f"{filled.stored} pairs, {len(index)} blocks, {workers} workers"
    return [
        exact(BYTES, bytes_a_pair, ROWS[BYTES], "bytes", note),
        exact(MATCH_SHORT, short.p99, ROWS[MATCH_SHORT], "us", short.note),
        exact(MATCH_LONG, long.p99, ROWS[MATCH_LONG], "us", long.note),
        exact(HASHED_SHORT, hashed[SHORT].p99, ROWS[HASHED_SHORT], "us", hashed[SHORT].note),
        exact(HASHED_LONG, hashed[LONG].p99, ROWS[HASHED_LONG], "us", hashed[LONG].note),
        grown(filled),
        exact(INGEST, rate / 1e6, ROWS[INGEST], "M/s", f"batches of {BATCH}"),
        exact(
            STALL, stall_ms, ROWS[STALL], "ms", "CPU time of one pass of the loop; one worker reports 100,000 blocks"
        ),
    ]


def _hash_and_match(index: CacheIndex, prompts: Sequence[array[int]], number: int) -> None:
    index.match(prefix_hashes(prompts[number % len(prompts)], BLOCK, 0))


def grown(filled: Filled, conversations: int = 20, turns: int = 20) -> Figure:
    """Measure how much `PromptHashes` hashes again when conversations grow. The conversations begin with 60,000 tokens
    and grow by TURN_TOKENS in each turn; they take their turns in rotation. The row's value is the number of hashed
    blocks relative to the blocks of the final prompts. `filled`: source of the token ids."""
    memory, times, fresh = PromptHashes(), [], []
    whole = [filled.token_ids(60_000 // BLOCK + turns * TURN_TOKENS // BLOCK) for _ in range(conversations)]
    lengths = [60_000 + turn * TURN_TOKENS for turn in range(turns)]
    for length in lengths:
        for ids in whole:
            prompt = ids[:length]
            begun = time.thread_time()
            memory.hashes(prompt, BLOCK, 0)
            middle = time.thread_time()
            prefix_hashes(prompt, BLOCK, 0)
            if length > lengths[0]:
                times.append(middle - begun)
                fresh.append(time.thread_time() - middle)
    share = memory.hashed_blocks / (conversations * (lengths[-1] // BLOCK))
    note = f"median {np.median(times) * 1e6:.0f} us a turn, from scratch {np.median(fresh) * 1e6:.0f} us"
    return exact(GROWN, share, ROWS[GROWN], "ratio", note)


class _Link:
    """The part of a link that WorkerCaches reads."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.identity = WorkerIdentity(name, "i", "m")
        self.info = EngineInfo("", "sim", "", BLOCK, 1 << 20, 1, 1, 1 << 20, 1 << 17, capabilities=(KV_EVENTS,))


async def longest_stall_ms(seed: int, workers: int = 100, seconds: float = 3.0) -> float:
    """Return the longest CPU time of one pass of the event loop, in milliseconds, while workers report blocks to a
    gateway's WorkerCaches. Together the workers report 100,000 blocks a second, each worker ten times a second. One
    further worker reports 100,000 blocks at once. The garbage collector has the same settings as in a serving
    gateway."""
    rng, caches = np.random.default_rng(seed), WorkerCaches()
    links = [_Link(f"w{number}") for number in range(workers)]
    blocks = 100_000 // workers // 10
    steady = [
        (link, KvChange(False, rng.integers(1, 1 << 63, blocks, np.uint64)))
        for _ in range(round(10 * seconds))
        for link in links
    ]
    for link in links:
        _report(caches, link, KvChange(True))
    await asyncio.sleep(0.1)
    large = _Link("large")
    snapshot = list(kv_blocks_to_pb(KvChange(True, rng.integers(1, 1 << 63, 100_000, np.uint64))))
    thresholds = gc.get_threshold()
    freeze_objects()
    begun, next_report, longest = time.monotonic(), 0, 0.0
    while next_report < len(steady):
        last = time.thread_time()
        if time.monotonic() - begun >= seconds * next_report / len(steady):
            _report(caches, *steady[next_report])
            next_report += 1
        if snapshot and next_report >= len(steady) // 2:
            caches.report(large, snapshot.pop(0))  # type: ignore[arg-type]
        await asyncio.sleep(0)
        longest = max(longest, time.thread_time() - last)
    gc.set_threshold(*thresholds)
    return longest * 1000


def _report(caches: WorkerCaches, link: _Link, change: KvChange) -> None:
    for message in kv_blocks_to_pb(change):
        caches.report(link, message)  # type: ignore[arg-type]


def run_peers(environment: Path, seed: int = 0, workers: int = WORKERS, pairs: int = PEER_PAIRS) -> list[Figure]:
    """Measure the two indexes of KV blocks with which Headrace's index is compared: a dict, run by this Python, and
    Dynamo's, run by the Python of `environment`. Returns the report's rows."""
    figures = []
    for name, (bytes_row, match_row) in PEERS.items():
        python = environment / "bin" / "python" if name == "dynamo" else Path(sys.executable)
        program = Path(__file__).with_name("index_peers.py")
        try:
            done = subprocess.run(
                [str(python), str(program), name, str(seed), str(workers), str(pairs)],
                capture_output=True, text=True, check=True, timeout=PEER_S,
            )  # fmt: skip
            values = json.loads(done.stdout)
        except (OSError, subprocess.SubprocessError, ValueError) as error:
            why = (getattr(error, "stderr", "") or repr(error)).strip().rpartition("\n")[2]
            figures += [missing(row, None, f"it does not run: {why}") for row in (bytes_row, match_row)]
            continue
        note = f"{values['pairs']} pairs; stored {values['stored_per_s'] / 1e6:.2f} M/s"
        figures.append(exact(bytes_row, values["bytes_a_pair"], None, "bytes", note))
        note = f"median {values['p50_us']:.0f} us, of 8,000 blocks {values['long_p50_us']:.0f} us"
        figures.append(exact(match_row, values["p99_us"], None, "us", note))
    return figures


async def measure(stage: Stage) -> list[Figure]:
    """Return the report's rows for this part."""
    ours = await asyncio.to_thread(run, stage.options.seed)
    return ours + await asyncio.to_thread(run_peers, stage.options.peers, stage.options.seed)


def main() -> None:
    """Print the report's rows."""
    parser = argparse.ArgumentParser(prog="python -m loadtests.routing.index", description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--pairs", type=int, default=PAIRS)
    parser.add_argument("--peers", type=Path, default=Path(".venv-peers"), help="the peers' environment")
    options = parser.parse_args()
    for figure in (*run(options.seed, pairs=options.pairs), *run_peers(options.peers, options.seed)):
        met = "" if figure.met is None else " met" if figure.met else " NOT met"
        value = figure.reason if figure.value is None else f"{figure.value:.4g} {figure.unit}"
        print(f"{figure.name}: {value} {figure.bound or ''}{met} ({figure.note})")


if __name__ == "__main__":
    main()
