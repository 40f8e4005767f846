"""The part `served_turns`: the cost of an agent's turn in the whole front end, compared with vllm-router and vLLM's
server.

The conversations are those of the part `turns`; they belong to four tenants. A driver process sends their turns over
HTTP, one at a time, in rotation. Both sides have vLLM's own engine core in a separate process, whose executor computes
nothing (scripted_core.py). The part measures the CPU time of all other processes: gateway, helpers and worker on
Headrace's side, router and server on the other side. The time of a turn ends when the driver makes the next body, so it
includes the work that a server does after its answer. The other side gets the same bodies, but only SAMPLED turns of
some conversations: its turns take long, and earlier turns do not make them cheaper.

Then some conversations take further turns at the same time, and the longest stall of the gateway's event loop is read.
Stalls are measured only in this last phase, because measuring them takes CPU time that would count for the turns.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from rich.table import Table

from loadtests import peers
from loadtests.agents import conversations, cores
from loadtests.agents.bodies import PreparedBodies
from loadtests.agents.families import FAMILIES
from loadtests.agents.turns import AT_ONCE, CONVERSATIONS, LAST_TURNS, MAX_MODEL_LEN, TENANTS, made
from loadtests.children import DidNotStart
from loadtests.cpu_clocks import FrontEndClocks, used_between
from loadtests.datasets import prose
from loadtests.faces.base import Answer, Request
from loadtests.figures import Bound, Figure, missing, ratio_figure
from loadtests.scenarios.common import Stage, rounds_of
from loadtests.scenarios.parts import exact
from loadtests.serving import ours as serving

SAMPLED = (1, 11, 22, 33, 43)
"""Numbers of the turns that the other side gets too, the first turn being 1."""
ANSWER_TOKENS = 4
"""Tokens of an answer. They are few, so that the cost of a turn is that of its prompt. The part tool_tokens measures
streamed tokens."""
SETTLE_S = 0.005
WARM_CHARS = 100_000
IDLE_S, IDLE_SHARE, IDLE_WITHIN_S = 0.5, 0.1, 60.0
"""A front end is idle if it has used less than IDLE_SHARE of a core for IDLE_S. The part waits for this at most
IDLE_WITHIN_S."""
P50 = "front-end CPU of an agent's turn over HTTP, gateway to engine client, p50"
LAST = "the same turns, mean of the last five"
P99 = "the same turns, p99"
AGAINST = f"the same, turns {', '.join(map(str, SAMPLED))}, against vllm-router before vLLM's server"
STALL = "longest stall of the gateway's event loop, in wall time"
ROWS: Mapping[str, Bound] = {
    P50: Bound("<=", 20),
    LAST: Bound("<=", 20),
    P99: Bound("<=", 40),
    AGAINST: Bound("<=", 0.2),
    STALL: Bound("<=", 20),
}
Messages = list[dict[str, Any]]
ENGINE: Mapping[str, object] = {"max_model_len": MAX_MODEL_LEN}
NO_PARSER: Mapping[str, object] = {"tool_call_parser": "none", "reasoning_parser": "none"}
"""Further arguments of Headrace's engine, which would choose parsers by the model's family. The requests have no tools,
and vLLM's server has no parsers by default."""


@dataclass
class ServedTurns:
    """Measurements of one family of models. Times are in milliseconds.

    `sampled_*`: one value for each conversation: the mean over those turns whose numbers are in SAMPLED.
    """

    family: str
    tokens: int = 0
    turns: int = 0
    p50_ms: float = 0.0
    last_ms: float = 0.0
    p99_ms: float = 0.0
    mean_by_process_ms: dict[str, float] = field(default_factory=dict)
    last_by_process_ms: dict[str, float] = field(default_factory=dict)
    """CPU time of our processes in the last five turns."""
    peer_by_process_ms: dict[str, float] = field(default_factory=dict)
    mean_by_turn_ms: list[float] = field(default_factory=list)
    peer_by_turn_ms: list[float] = field(default_factory=list)
    sampled_ours_ms: list[float] = field(default_factory=list)
    sampled_peer_ms: list[float] = field(default_factory=list)
    stall_ms: float = 0.0
    stall_cpu_ms: float = 0.0
    different_prompts: int = 0
    peer_problem: str = ""


class Side:
    """One side of the comparison: a client for each tenant, and the CPU clocks of the side's front end."""

    def __init__(self, url: str, keys: Sequence[str], roots: Sequence[tuple[int, str]]) -> None:
        self._bodies: dict[str, bytes] = {}
        self.faces = [PreparedBodies(url, self._bodies, api_key=key) for key in keys]
        self.clocks = FrontEndClocks(roots)

    async def call(self, key: str, body: bytes, tenant: int) -> Answer:
        """Make a call and return the answer. Raises CallFailed."""
        self._bodies[key] = body
        try:
            return await self.faces[tenant % len(self.faces)].run(Request(key, "", ANSWER_TOKENS), lambda text: None)
        finally:
            del self._bodies[key]

    async def warm(self) -> None:
        """Make a first long call for each tenant, and wait until the front end is idle."""
        for tenant in range(len(self.faces)):
            text = prose(f"warm/{tenant}", WARM_CHARS)
            await self.call("warm", body_of([{"role": "user", "content": text}]), tenant)
        deadline = time.monotonic() + IDLE_WITHIN_S
        while time.monotonic() < deadline:
            self.clocks.find_processes()
            before = self.clocks.read()
            await asyncio.sleep(IDLE_S)
            if sum(used_between(before, self.clocks.read()).values()) < IDLE_SHARE * IDLE_S:
                return

    async def close(self) -> None:
        """Close all connections."""
        for face in self.faces:
            await face.close()


def body_of(messages: Messages) -> bytes:
    """Return the HTTP request body that sends these messages to the model."""
    usage = {"include_usage": True}
    return conversations.body(messages, model=serving.MODEL, max_tokens=ANSWER_TOKENS, stream_options=usage)


async def measure(stage: Stage) -> list[Figure]:
    """Measure the turns of each model family in FAMILIES, and return the report's rows. Raises DidNotStart if a server
    does not start."""
    folder = await cores.write_models(stage.children, stage.folder, {family: {} for family in FAMILIES})
    rows = []
    for family in FAMILIES:
        stage.screen.say(f"turns of {family}")
        rows.append(await Family(stage, family, folder / family).measure())
    stage.report.settings["served_turns"] = [asdict(row) for row in rows]
    stage.screen.console.print(table(rows))
    wrong = sum(row.different_prompts for row in rows)
    if wrong:
        stage.report.problems.append(f"served_turns: {wrong} prompts have another number of tokens on the other side")
    return figures(rows)


class Family:
    """The measurement of one tokenizer family (families.py)."""

    def __init__(self, stage: Stage, family: str, model: Any) -> None:
        self._stage, self._model = stage, model
        self._out = ServedTurns(family)
        count = stage.options.concurrency or CONVERSATIONS
        self._talks = made(family, count, conversations.TURNS)
        self._at_once = made(family, min(count, AT_ONCE), conversations.TURNS + LAST_TURNS)
        self._sampled = range(min(rounds_of(stage.options), count))
        self._stalls = stage.folder / f"{family}.stalls"

    async def measure(self) -> ServedTurns:
        """Start Headrace, and vLLM's server behind vllm-router; measure all turns; stop all processes."""
        ours, theirs = await asyncio.gather(self._start_ours(), self._start_peer())
        keys = ours.keys
        side = Side(ours.http, keys, ours.roots)
        try:
            await side.warm()
            await self._one_at_a_time(side, theirs)
            await serving.read_stalls(ours, self._stalls)
            await self._turns_at_once(side)
            stalls = await serving.read_stalls(ours, self._stalls)
        finally:
            for one in (side, theirs):
                if one is not None:
                    await one.close()
            for child in self._stage.children.started:
                await child.stop()
        self._out.stall_ms, self._out.stall_cpu_ms = 1000 * stalls["worst_s"], 1000 * stalls["cpu_s"]
        return self._out

    async def _start_ours(self) -> serving.Ours:
        name, engine = f"turns-{self._out.family}", {**ENGINE, **NO_PARSER}
        return await cores.start_ours(
            self._stage.children, self._stage.folder, self._model, 0, engine, name,
            witness=("--stalls", str(self._stalls), "--stalls-later"), tenant_count=TENANTS,
        )  # fmt: skip

    async def _start_peer(self) -> Side | None:
        children = self._stage.children
        try:
            server, port = await cores.start_server(children, self._model, 0, ENGINE)
            router = await peers.vllm_router(children, self._stage.options.peers, port)
        except (DidNotStart, peers.NoPeers) as error:
            self._out.peer_problem = str(error)
            return None
        roots = [(router.child.pid, router.child.kind), (server.child.pid, server.child.kind)]
        side = Side(router.url, [""], roots)
        await side.warm()
        return side

    def _bodies(self) -> Iterator[tuple[int, int, bytes]]:
        """Yield the request body of each turn of each conversation, as (number of the turn, number of the conversation,
        body)."""
        for number in range(len(self._talks[0])):
            for i, talk in enumerate(self._talks):
                yield number, i, body_of(talk[number])

    async def _one_at_a_time(self, ours: Side, theirs: Side | None) -> None:
        costs: list[list[float]] = []
        by_process: dict[str, float] = {}
        last_by_process: dict[str, float] = {}
        peer_costs: dict[int, list[float]] = {}
        peer_by_process: dict[str, float] = {}
        sampled: dict[int, list[tuple[float, float]]] = {}
        bodies = self._bodies()
        following = next(bodies, None)
        while following is not None:
            number, i, body = following
            if i == 0:
                costs.append([])
                ours.clocks.find_processes()
            before = ours.clocks.read()
            answer = await ours.call(f"{number}/{i}", body, i)
            following = next(bodies, None)
            used = used_between(before, ours.clocks.read())
            cost = 1000 * sum(used.values())
            costs[-1].append(cost)
            if number:
                _add(by_process, used)
            if number >= len(self._talks[0]) - LAST_TURNS:
                _add(last_by_process, used)
            self._out.tokens = max(self._out.tokens, answer.prompt_tokens or 0)
            if theirs is None or number + 1 not in SAMPLED or i not in self._sampled:
                continue
            theirs.clocks.find_processes()
            before = theirs.clocks.read()
            other = await theirs.call(f"{number}/{i}", body, i)
            await asyncio.sleep(SETTLE_S)
            used = used_between(before, theirs.clocks.read())
            _add(peer_by_process, used)
            peer_costs.setdefault(number, []).append(1000 * sum(used.values()))
            sampled.setdefault(i, []).append((cost, 1000 * sum(used.values())))
            self._out.different_prompts += other.prompt_tokens != answer.prompt_tokens
        out, repeated = self._out, sorted(cost for row in costs[1:] for cost in row)
        out.turns = len(repeated)
        out.p50_ms, out.p99_ms = statistics.median(repeated), repeated[min(int(0.99 * out.turns), out.turns - 1)]
        out.mean_by_turn_ms = [round(statistics.fmean(row), 2) for row in costs]
        out.last_ms = statistics.fmean(out.mean_by_turn_ms[-LAST_TURNS:])
        out.mean_by_process_ms = {kind: round(1000 * s / out.turns, 2) for kind, s in by_process.items()}
        count = LAST_TURNS * len(self._talks)
        out.last_by_process_ms = {kind: round(1000 * s / count, 2) for kind, s in last_by_process.items()}
        count = sum(map(len, peer_costs.values())) or 1
        out.peer_by_process_ms = {kind: round(1000 * s / count, 2) for kind, s in peer_by_process.items()}
        out.peer_by_turn_ms = [round(statistics.fmean(row), 2) for row in peer_costs.values()]
        out.sampled_ours_ms = [statistics.fmean(cost for cost, _ in pairs) for pairs in sampled.values()]
        out.sampled_peer_ms = [statistics.fmean(cost for _, cost in pairs) for pairs in sampled.values()]

    async def _turns_at_once(self, ours: Side) -> None:
        for number in range(conversations.TURNS, conversations.TURNS + LAST_TURNS):
            bodies = [body_of(talk[number]) for talk in self._at_once]
            await asyncio.gather(*(ours.call(f"{number}/{i}", body, i) for i, body in enumerate(bodies)))


def _add(total: dict[str, float], more: Mapping[str, float]) -> None:
    for kind, value in more.items():
        total[kind] = total.get(kind, 0.0) + value


def figures(rows: Sequence[ServedTurns]) -> list[Figure]:
    """Return the report's rows for this part, each with the value of the worst family."""
    worst = {
        P50: max(row.p50_ms for row in rows),
        LAST: max(row.last_ms for row in rows),
        P99: max(row.p99_ms for row in rows),
        STALL: max(row.stall_ms for row in rows),
    }
    families = f"the worst of {len(rows)} tokenizer families"
    stalls = ", ".join(f"{row.stall_ms:.1f} ({row.stall_cpu_ms:.1f} of it CPU)" for row in rows)
    notes = {STALL: f"{AT_ONCE} turns at once; by family: {stalls}"}
    out = {name: exact(name, value, ROWS[name], "ms", notes.get(name, families)) for name, value in worst.items()}
    out[AGAINST] = _against(rows)
    return [out[name] for name in ROWS]


def _against(rows: Sequence[ServedTurns]) -> Figure:
    bound = ROWS[AGAINST]
    problem = next((row.peer_problem for row in rows if row.peer_problem), "")
    if problem or not all(row.sampled_ours_ms for row in rows):
        return missing(AGAINST, bound, f"the other side did not run: {problem}")
    ratios = [
        ratio_figure(AGAINST, row.sampled_ours_ms, row.sampled_peer_ms, bound, difference_unit="ms") for row in rows
    ]
    by_family = ", ".join(f"{row.family} {figure.value:.3f}" for row, figure in zip(rows, ratios, strict=True))
    worst = max(ratios, key=lambda figure: figure.high or 0.0)
    return replace(worst, note=f"mean of a conversation's turns; the worst family: {by_family}")


def table(rows: Sequence[ServedTurns]) -> Table:
    """Return the report's table, with one row for each model family."""
    out = Table("family", "tokens", "turns", "p50 ms", "last five ms", "p99 ms", "of the last five", "router, server")
    for name in ("their turns", "stall ms", "its CPU ms"):
        out.add_column(name)
    for row in rows:
        ours = ", ".join(f"{kind} {value:.1f}" for kind, value in row.last_by_process_ms.items())
        theirs = ", ".join(f"{kind} {value:.1f}" for kind, value in row.peer_by_process_ms.items())
        times = (f"{value:.1f}" for value in (row.p50_ms, row.last_ms, row.p99_ms))
        turns = ", ".join(f"{value:.0f}" for value in row.peer_by_turn_ms)
        stalls = (f"{row.stall_ms:.1f}", f"{row.stall_cpu_ms:.1f}")
        out.add_row(row.family, f"{row.tokens}", f"{row.turns}", *times, ours, theirs, turns, *stalls)
    return out
