"""The cost of an agent's turn in the gateway's front end: parsing the body, rendering, tokenizing.

`python -m loadtests.agents.turns [--json FILE]`

First part: the turns of many conversations of four tenants run one after another, so that the CPU time of each turn is
known exactly. This is the CPU time of two kinds of processes: this process, which does the work of a gateway, and its
helper processes.

Second part: turns of several conversations run at once, and the longest stall of the event loop is measured. The stall
is measured in wall-clock time and in CPU time of the loop's thread, because on a busy machine the thread also waits for
a core.

The token ids of some turns are compared with the ids of the whole prompt, tokenized at once.

Part with `--memory`: many conversations of half the length run, and then the oldest of them get one more turn.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

import psutil
from rich.console import Console
from rich.table import Table

from cluster.gateway.apis.bodies import Bodies
from cluster.gateway.calls.request import ChatPrompt
from cluster.gateway.calls.tokenization import encode
from cluster.gateway.text.encoding.prompt_memory import PromptMemory
from cluster.gateway.text.tokenizer import TextModel
from loadtests.agents import conversations
from loadtests.agents.families import FAMILIES, HAS_TOOLS, SCALES, bundle
from loadtests.figures import Bound, Figure
from loadtests.scenarios.common import Stage
from loadtests.scenarios.parts import exact

CONVERSATIONS, TENANTS, AT_ONCE, LAST_TURNS = 64, 4, 8, 5
MAX_MODEL_LEN: Final = 262_144
CHECK_EVERY: Final = 97
"""Number of turns per check. A check compares a turn's token ids with those of the whole prompt, tokenized at once."""
Messages = list[dict[str, Any]]
P50 = "CPU of an agent's turn in the front end, p50"
LAST = "the same, mean of the last five turns"
P99 = "the same, p99"
STALL = "longest stall of the event loop"
DIFFERENT = "turns whose token ids differ from those from scratch"
ROWS: Mapping[str, Bound] = {
    P50: Bound("<=", 20),
    LAST: Bound("<=", 20),
    P99: Bound("<=", 40),
    STALL: Bound("<=", 20),
    DIFFERENT: Bound("<=", 0),
}


@dataclass
class Turns:
    """The measured turns of one model family. Times are in milliseconds; `stall_ms` is the longest stall of the event
    loop while AT_ONCE turns run at the same time."""

    family: str
    tokens: int = 0
    turns: int = 0
    p50_ms: float = 0.0
    last_ms: float = 0.0
    p99_ms: float = 0.0
    gateway_ms: float = 0.0
    scratch_ms: float = 0.0
    stall_ms: float = 0.0
    stall_cpu_ms: float = 0.0
    memory_mib: float = 0.0
    checked: int = 0
    different: int = 0
    mean_by_turn_ms: list[float] = field(default_factory=list)


class FrontEnd:
    """The part of a gateway that turns the request bodies for one model into token ids."""

    def __init__(self, family: str) -> None:
        self.memory = PromptMemory()
        self.text = TextModel.from_bundle(bundle(family), memory=self.memory)
        self.bodies = Bodies()

    async def start(self) -> None:
        """Start all helper processes."""
        assert self.text.pool is not None
        await asyncio.gather(self.text.pool.ready(), self.bodies.pool.ready())

    def close(self) -> None:
        """End all helper processes."""
        assert self.text.pool is not None
        self.text.pool.close()
        self.bodies.close()

    async def turn(self, body: bytes, tenant: str) -> Sequence[int]:
        """Process a body as a gateway does; return the prompt's token ids."""
        parsed = await self.bodies.http("chat", body, tenant)
        return await encode(parsed.requests[0].prompt, self.text, tenant, MAX_MODEL_LEN)

    async def from_scratch(self, body: bytes) -> Sequence[int]:
        """Return the token ids of a body's prompt, tokenized whole without the prompt memory."""
        prompt = await self._parsed(body)
        return self.text.codec.encode_chat(prompt.messages, **prompt.template_options)

    async def remember(self, body: bytes, tenant: str) -> None:
        """Tokenize a body in this process, so that the prompt memory has it."""
        prompt = await self._parsed(body)
        self.text.codec.chat_ids(tenant, prompt.messages, **prompt.template_options)

    async def _parsed(self, body: bytes) -> ChatPrompt:
        prompt = (await self.bodies.http("chat", body)).requests[0].prompt
        assert isinstance(prompt, ChatPrompt), "bodies of this size are parsed in the gateway"
        return prompt

    def cpu_s(self) -> tuple[float, float]:
        """Return the CPU seconds used so far by this process, and by its helpers."""
        assert self.text.pool is not None
        return time.process_time(), sum(map(_cpu_s, self.text.pool.pids | self.bodies.pool.pids))


def _cpu_s(pid: int) -> float:
    """Return the CPU seconds of a process. Reads schedstat, which is in nanoseconds; stat has steps of 10 ms."""
    return sum(int((task / "schedstat").read_text().split()[0]) for task in Path(f"/proc/{pid}/task").iterdir()) / 1e9


def made(family: str, count: int, turns: int, first: int = 0) -> list[list[Messages]]:
    """Return `count` conversations, assigned in turn to TENANTS tenants. Conversations of one tenant have the same
    system prompt."""
    numbers = range(first, first + count)
    return [
        [
            messages if family in HAS_TOOLS else conversations.without_tools(messages)
            for messages in conversations.conversation(f"{i}", SCALES[family], f"tenant-{i % TENANTS}", turns)
        ]
        for i in numbers
    ]


async def one_at_a_time(front: FrontEnd, talks: Sequence[Sequence[Messages]], figures: Turns) -> None:
    """Make all calls one after the other: turn 1 of every conversation, then turn 2 of every conversation, and so on.
    Record the CPU times in `figures`."""
    by_turn: list[list[float]] = []
    own: list[float] = []
    for number in range(len(talks[0])):
        costs = []
        for i, talk in enumerate(talks):
            body = conversations.body(talk[number])
            before = front.cpu_s()
            ids = await front.turn(body, f"tenant-{i % TENANTS}")
            after = front.cpu_s()
            own.append(1000 * (after[0] - before[0]))
            costs.append(own[-1] + 1000 * (after[1] - before[1]))
            figures.tokens = max(figures.tokens, len(ids))
            if (number * len(talks) + i) % CHECK_EVERY == 0 or (number, i) == (len(talk) - 1, 0):
                figures.checked += 1
                figures.different += list(ids) != list(await front.from_scratch(body))
        by_turn.append(costs)
    repeated = sorted(cost for costs in by_turn[1:] for cost in costs)
    figures.turns = len(repeated)
    figures.p50_ms = statistics.median(repeated)
    figures.p99_ms = repeated[min(len(repeated) - 1, int(0.99 * len(repeated)))]
    figures.mean_by_turn_ms = [round(statistics.fmean(costs), 2) for costs in by_turn]
    figures.last_ms = statistics.fmean(figures.mean_by_turn_ms[-LAST_TURNS:])
    figures.gateway_ms = statistics.median(own[len(talks) :])
    figures.memory_mib = front.memory.bytes / 2**20
    before = front.cpu_s()
    await front.turn(body, "a tenant that has sent nothing")
    figures.scratch_ms = 1000 * (sum(front.cpu_s()) - sum(before))


async def all_at_once(front: FrontEnd, talks: Sequence[Sequence[Messages]]) -> tuple[float, float]:
    """Let all conversations take a turn at the same time, for each of the last LAST_TURNS turns. Return the longest
    stall of the event loop, and the most CPU time that the loop used in a stall, in milliseconds."""
    worst_s, worst_cpu_s, ended = 0.0, 0.0, False

    async def witness() -> None:
        nonlocal worst_s, worst_cpu_s
        while not ended:
            before, cpu = time.perf_counter(), time.thread_time()
            await asyncio.sleep(0)
            worst_s, worst_cpu_s = (
                max(worst_s, time.perf_counter() - before),
                max(worst_cpu_s, time.thread_time() - cpu),
            )

    for number in range(len(talks[0]) - LAST_TURNS, len(talks[0])):
        bodies = [conversations.body(talk[number]) for talk in talks]
        ended, watching = False, asyncio.create_task(witness())
        await asyncio.sleep(0.01)
        await asyncio.gather(*(front.turn(body, f"tenant-{i % TENANTS}") for i, body in enumerate(bodies)))
        ended = True
        await watching
    return 1000 * worst_s, 1000 * worst_cpu_s


async def mean_ms(front: FrontEnd, bodies: Sequence[bytes], tenants: Sequence[str]) -> float:
    """Return the mean CPU time of turns, in milliseconds."""
    before = sum(front.cpu_s())
    for body, tenant in zip(bodies, tenants, strict=True):
        await front.turn(body, tenant)
    return 1000 * (sum(front.cpu_s()) - before) / len(bodies)


@dataclass
class Remembered:
    """Measurements of the gateway's prompt memory after `conversations` conversations.

    The conversations have half as many turns as in the other parts. `mib`: size of the prompt memory by its own count.
    `grown_mib`: growth of this process's memory. `oldest_ms`: mean CPU time of one more turn of the oldest
    conversations. `scratch_ms`: the same, if the prompt memory holds nothing of these conversations.
    """

    conversations: int
    mib: float = 0.0
    grown_mib: float = 0.0
    oldest_ms: float = 0.0
    scratch_ms: float = 0.0


async def remember(count: int, family: str = "byte-level", sample: int = 20) -> Remembered:
    """Measure the prompt memory with `count` conversations: its size, and how long a next turn takes.

    At first, each conversation is tokenized up to the middle of its turns, one conversation after the other. Then the
    `sample` oldest conversations take their next turn. All of this happens in this process, because the prompt memory
    is in this process.
    """
    front, half = FrontEnd(family), conversations.TURNS // 2
    await front.start()
    figures, process = Remembered(count), psutil.Process()
    await front.remember(conversations.body(made(family, 1, half)[0][-1]), "a stranger")
    before = process.memory_info().rss
    try:
        for i in range(count):
            await front.remember(conversations.body(made(family, 1, half, i)[0][-1]), f"tenant-{i % TENANTS}")
        figures.mib, figures.grown_mib = front.memory.bytes / 2**20, (process.memory_info().rss - before) / 2**20
        bodies = [conversations.body(made(family, 1, half + 1, i)[0][-1]) for i in range(sample)]
        await mean_ms(front, bodies[:4], ["warm"] * 4)  # the helpers have encoded nothing yet
        figures.oldest_ms = await mean_ms(front, bodies, [f"tenant-{i % TENANTS}" for i in range(sample)])
        figures.scratch_ms = await mean_ms(front, bodies, [f"stranger-{i}" for i in range(sample)])
    finally:
        front.close()
    return figures


async def measure_family(family: str, count: int = CONVERSATIONS, turns: int = conversations.TURNS) -> Turns:
    """Return the figures of one family."""
    front, figures = FrontEnd(family), Turns(family)
    await front.start()
    try:
        talks = made(family, count, turns)
        await one_at_a_time(front, talks, figures)
        figures.stall_ms, figures.stall_cpu_ms = await all_at_once(front, talks[:AT_ONCE])
    finally:
        front.close()
    return figures


async def measure(stage: Stage) -> list[Figure]:
    """Return the scenario's rows. Each row has the value of the worst tokenizer family."""
    rows = [await measure_family(family) for family in FAMILIES]
    stage.report.settings["turns"] = [asdict(row) for row in rows]
    stage.screen.console.print(table(rows))
    worst = {
        P50: max(row.p50_ms for row in rows),
        LAST: max(row.last_ms for row in rows),
        P99: max(row.p99_ms for row in rows),
        STALL: max(row.stall_ms for row in rows),
        DIFFERENT: sum(row.different for row in rows),
    }
    checked = sum(row.checked for row in rows)
    notes = {DIFFERENT: f"{checked} turns checked", STALL: "wall time, which includes waiting for a core"}
    units = {DIFFERENT: ""}
    return [
        exact(
            name,
            value,
            ROWS[name],
            units.get(name, "ms"),
            notes.get(name, f"the worst of {len(rows)} tokenizer families; gateway and helper processes"),
        )
        for name, value in worst.items()
    ]


def table(rows: Iterable[Turns]) -> Table:
    """Return the report's table, with one row for each model family."""
    out = Table("family", "tokens", "turns", "p50 ms", "last five ms", "p99 ms", "of it gateway ms", "not seen ms")
    for name in ("stall ms", "its CPU ms", "memory MiB", "ids differ"):
        out.add_column(name)
    for row in rows:
        times: tuple[float, ...] = (row.p50_ms, row.last_ms, row.p99_ms, row.gateway_ms, row.scratch_ms, row.stall_ms)
        times += (row.stall_cpu_ms, row.memory_mib)
        different = f"{row.different} of {row.checked}"
        out.add_row(row.family, f"{row.tokens}", f"{row.turns}", *(f"{value:.1f}" for value in times), different)
    return out


def main() -> None:
    """Measure, print the table, and write the report."""
    arguments = argparse.ArgumentParser(prog="python -m loadtests.agents.turns", description=__doc__)
    arguments.add_argument("--conversations", type=int, default=CONVERSATIONS)
    arguments.add_argument("--turns", type=int, default=conversations.TURNS)
    arguments.add_argument("--family", action="append", choices=FAMILIES, help="only this family; may be repeated")
    arguments.add_argument(
        "--memory", type=int, default=0, metavar="N", help="let N conversations of half length follow"
    )
    arguments.add_argument("--json", type=Path, metavar="FILE", help="write the whole report")
    options = arguments.parse_args()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    rows = [
        asyncio.run(measure_family(family, options.conversations, options.turns))
        for family in options.family or FAMILIES
    ]
    console = Console(width=160)
    console.print(table(rows))
    report: dict[str, Any] = {"turns": [asdict(row) for row in rows]}
    if options.memory:
        report["memory"] = asdict(asyncio.run(remember(options.memory)))
        console.print(report["memory"])
    if options.json is not None:
        options.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
