"""The part `clients`: real clients finish a task of twelve turns with tools, while workers are killed in mid-stream.

Agent loops of libraries and coding agents, unmodified, work on a scripted model behind a gateway with four workers. In
each task the worker that generates the answer is killed by SIGKILL three times: half-way through the arguments of a
tool call, through a text, and through the reasoning. Another worker continues the answer, and a new worker replaces the
dead one. Each tool must get the script's arguments once, each prompt must hold all texts and results, and no client may
need to repeat a request.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.metadata
import json
import os
import shutil
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from cluster.api.outcomes import Outcome as CallOutcome
from cluster.cli.local.gateway_metrics import gateway_rows, scrape
from loadtests.agents import servers
from loadtests.agents.cases import Call
from loadtests.agents.client_tasks.coding import (
    CODING_AGENTS,
    ENVIRONMENT,
    NODE_MODULES,
    CodingAgent,
    Server,
    coding_task,
    judge_files,
)
from loadtests.agents.client_tasks.prepare import MAX_MODEL_TOKENS, MODEL
from loadtests.agents.client_tasks.tasks import (
    FAMILY,
    SIDE,
    SIDE_TEXT,
    TOOLS,
    TURNS,
    Outcome,
    Submitted,
    Task,
    function_task,
    judge_calls,
    judge_requests,
)
from loadtests.children import ROOT, Child, Children
from loadtests.figures import Bound, Figure
from loadtests.scenarios.common import Stage
from loadtests.scenarios.parts import exact
from loadtests.traces import NoData

PROGRAMS = Path(__file__).parent / "client_programs"
PACE_S, WORKERS = 0.01, 4
"""Seconds of an engine's step of 1 to 5 tokens, and number of workers."""
CLIENT_S, LINKED_S = 240.0, 300.0
SHOWN = 3
"""Number of faults of a run that are printed. The report has all of them."""
RAN = "runs of real clients: twelve turns with tool calls, and a last text"
CLIENTS = "clients among them"
FINISHED = "runs that ended with everything as in the script"
WRONG_CALLS = "tool calls that were not made once with the script's arguments"
REPEATED = "requests that a client had to repeat"
REFUSED = "calls of clients that the gateway did not answer with success"
DIED = "workers killed in the middle of an answer"
RESUMED = "answers that another worker continued"
ROWS: Mapping[str, Bound | None] = {
    RAN: Bound(">=", 10),
    CLIENTS: Bound(">=", 6),
    FINISHED: Bound(">=", 10),
    WRONG_CALLS: Bound("<=", 0),
    REPEATED: Bound("<=", 0),
    REFUSED: Bound("<=", 0),
    DIED: Bound(">=", 30),
    RESUMED: Bound(">=", 30),
}


@dataclass(frozen=True, slots=True)
class Library:
    """A client library. `program`: the program that uses the library: a Python module, or a script for Node.js."""

    name: str
    program: str
    package: str

    @property
    def is_node(self) -> bool:
        """Whether the library runs on Node.js."""
        return self.program.endswith(".mjs")


LIBRARIES = (
    Library("ai-sdk", "ai_sdk.mjs", "ai"),
    Library("pydantic-ai", "pydantic_ai_agent", "pydantic-ai-slim"),
    Library("openai-agents", "openai_agents_agent", "openai-agents"),
    Library("langchain", "langchain_agent", "langchain"),
)
NAMES = (*(library.name for library in LIBRARIES), *(agent.name for agent in CODING_AGENTS))
"""Names of all clients."""


@dataclass(frozen=True, slots=True)
class Run:
    """A run of a client on a task: its program, the program's environment, and its working folder.

    `record`: file in which the program records its calls; None for a coding agent, whose written files show its calls.
    """

    client: str
    api: str
    stream: bool
    version: str
    task: Task
    command: Sequence[str]
    environment: Mapping[str, str]
    folder: Path
    record: Path | None = None


@dataclass(frozen=True, slots=True)
class Row:
    """A run and its outcome. `died`: number of workers that died during the run."""

    run: Run
    outcome: Outcome
    died: int
    seconds: float

    def as_json(self) -> dict[str, Any]:
        """Return the row as plain values."""
        run = {"client": self.run.client, "version": self.run.version, "api": self.run.api, "stream": self.run.stream}
        return {**run, **asdict(self.outcome), "workers died": self.died, "seconds": round(self.seconds, 1)}


class Workers:
    """A set of `WORKERS` workers. Each worker that dies is replaced by a new one."""

    def __init__(self, children: Children, folder: Path, given: Mapping[str, Any]) -> None:
        """Prepare the workers without starting them. `given`: settings of the worker program."""
        self._children, self._folder, self._given = children, folder, given
        self._started = 0
        self.died = 0

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[Workers]:
        """Keep the workers alive within the context."""
        keeping = [asyncio.create_task(self._keep()) for _ in range(WORKERS)]
        try:
            yield self
        finally:
            for task in keeping:
                task.cancel()
            await asyncio.gather(*keeping, return_exceptions=True)

    async def _keep(self) -> None:
        while True:
            child = await self._start()
            while child.alive:  # noqa: ASYNC110 - another process's end is no event
                await asyncio.sleep(0.05)
            self.died += 1

    async def _start(self) -> Child:
        self._started += 1
        name = f"w{self._started}"
        models = [{**model, "worker": name} for model in self._given["models"]]
        return await servers.start_program(
            self._children, self._folder, f"clients-{name}", "loadtests.agents.client_tasks.worker",
            {**self._given, "models": models},
        )  # fmt: skip


async def measure(stage: Stage) -> list[Figure]:
    """Run the clients and return the report's rows. Raises NoData if the clients are not installed, ValueError for the
    name of an unknown client, or DidNotStart."""
    chosen = stage.options.clients or NAMES
    if unknown := sorted(set(chosen) - set(NAMES)):
        raise ValueError(f"--client {unknown[0]}: no such client; the clients are {', '.join(NAMES)}")
    if not NODE_MODULES.is_dir():
        raise NoData(f"{NODE_MODULES} is missing: `make bench-clients` installs the clients")
    folder = stage.folder / "clients"
    folder.mkdir()
    gateway = await servers.start_gateway(stage.children, folder, [MODEL], "clients")
    server = Server(f"http://{gateway.endpoints['http']}", gateway.key, MODEL, MAX_MODEL_TOKENS)
    runs = [*library_runs(folder, server), *coding_runs(folder, server)]
    runs = [run for run in runs if run.client in chosen]
    stage.screen.say("writing the model and the scripts")
    models = await prepare(stage.children, folder, [run.task for run in runs])
    log = folder / "requests.jsonl"
    log.touch()
    given = {
        "models": models, "link": gateway.endpoints["link"], "seed": stage.options.seed, "prompts": folder / "prompts",
        "pace_s": PACE_S, "deaths": folder / "made" / "deaths.json", "log": log, "folder": folder,
    }  # fmt: skip
    rows = []
    async with Workers(stage.children, folder, given).running() as workers:
        for run in runs:
            await until_linked(gateway)
            rows.append(await play(stage, run, log, workers))
    samples = await asyncio.to_thread(scrape, gateway.endpoints["metrics"])
    outcomes = calls_by_outcome(samples or ())
    stage.report.settings |= {"clients": [row.as_json() for row in rows], "clients: calls by outcome": outcomes}
    stage.screen.console.print(table(rows))
    stage.screen.say(f"calls by outcome: {outcomes}")
    return figures(rows, outcomes)


async def prepare(children: Children, folder: Path, tasks: Sequence[Task]) -> list[dict[str, Any]]:
    """Write model, bundle and scripts of all tasks; return the model's entry for the workers."""
    file, made = folder / "texts.json", folder / "made"
    answers = {SIDE: FAMILY.answer((), SIDE_TEXT)} | {key: text for task in tasks for key, text in task.answers.items()}
    deaths = {key: characters for task in tasks for key, characters in task.deaths.items()}
    file.write_text(json.dumps({"answers": answers, "deaths": deaths}))
    return await servers.prepare_models(children, "loadtests.agents.client_tasks.prepare", file, made)


async def until_linked(gateway: servers.Gateway) -> None:
    """Wait until all workers have a link. Raises TimeoutError."""
    deadline = time.monotonic() + LINKED_S
    while (linked := (await asyncio.to_thread(gateway_rows, [gateway.endpoints]))[0]["workers"]) < WORKERS:
        if time.monotonic() > deadline:
            raise TimeoutError(
                f"{linked} of {WORKERS} workers had a link after {LINKED_S:g} s; --logs keeps their logs"
            )
        await asyncio.sleep(0.1)


# -- the runs


def library_runs(folder: Path, server: Server) -> list[Run]:
    """Return two runs of each library: one with whole answers, one with streamed answers."""
    return [_library_run(folder, server, library, stream) for library in LIBRARIES for stream in (False, True)]


def _library_run(folder: Path, server: Server, library: Library, stream: bool) -> Run:
    task = function_task(f"{library.name}-{'streamed' if stream else 'whole'}")
    work, record = folder / task.name, folder / f"{task.name}.jsonl"
    work.mkdir()
    given = {
        "base_url": server.root + "/v1", "key": server.key, "model": server.model, "stream": stream,
        "prompt": f"{task.mark} Do what is to be done.", "tools": TOOLS, "record": str(record),
        "results": [
            {"name": call.name, "arguments": call.arguments, "result": result}
            for call, result in zip(task.calls, task.results, strict=True)
        ],
    }  # fmt: skip
    file = work / "task.json"
    file.write_text(json.dumps(given))
    if library.is_node:
        # Node.js looks for packages in the folders above a script.
        shutil.copy(PROGRAMS / library.program, work)
        (work / "node_modules").symlink_to(NODE_MODULES)
        command = [str(ENVIRONMENT / "bin" / "node"), str(work / library.program), str(file)]
    else:
        module = f"loadtests.agents.client_programs.{library.program}"
        command = [str(ENVIRONMENT / "bin" / "python"), "-m", module, str(file)]
    return Run(
        library.name, "chat", stream, versions(library.is_node, library.package), task, command, {}, ROOT, record
    )


def coding_runs(folder: Path, server: Server) -> list[Run]:
    """Return one run for each coding agent, each with its own home folder and working folder. All coding agents stream
    their answers."""
    return [_coding_run(folder, server, agent) for agent in CODING_AGENTS]


def _coding_run(folder: Path, server: Server, agent: CodingAgent) -> Run:
    home, work = folder / f"{agent.name}-home", folder / f"{agent.name}-work"
    work.mkdir()
    task = coding_task(agent.name, agent.tools, work)
    for name, value in agent.settings(server).items():
        (home / name).parent.mkdir(parents=True, exist_ok=True)
        (home / name).write_text(json.dumps(value))
    home.mkdir(exist_ok=True)
    command = agent.command(server, f"{task.mark} Do what is to be done in this folder.")
    environment = {
        "HOME": str(home), "XDG_CONFIG_HOME": str(home / ".config"), "XDG_DATA_HOME": str(home / ".local/share"),
        "XDG_CACHE_HOME": str(home / ".cache"), "XDG_STATE_HOME": str(home / ".local/state"),
        **agent.environment(server),
    }  # fmt: skip
    return Run(agent.name, agent.api, True, versions(True, agent.package), task, command, environment, work)


def versions(is_node: bool, package: str) -> str:
    """Return name and installed version of a package from npm or PyPI."""
    if is_node:
        return f"{package} {json.loads((NODE_MODULES / package / 'package.json').read_text())['version']}"
    (found,) = importlib.metadata.distributions(
        name=package, path=[str(each) for each in ENVIRONMENT.glob("lib/python*/site-packages")]
    )
    return f"{package} {found.version}"


async def play(stage: Stage, run: Run, log: Path, workers: Workers) -> Row:
    """Run a client to its end and return its row."""
    before, died, began = log.stat().st_size, workers.died, time.monotonic()
    child = stage.children.start(run.task.name, "client", program(run))
    wrong = []
    try:
        async with asyncio.timeout(CLIENT_S):
            while child.alive:  # noqa: ASYNC110 - another process's end is no event
                await asyncio.sleep(0.05)
    except TimeoutError:
        wrong.append(f"it had not ended after {CLIENT_S:g} s")
    await child.stop()
    if child.process.returncode:
        wrong.append(f"it ended with exit code {child.process.returncode}; its log ends:\n{child.tail()}")
    submitted = [Submitted(**json.loads(line)) for line in _since(log, before)]
    seen, wrong_prompts = judge_requests(run.task, submitted)
    right, wrong_calls = judge(run, child.log)
    died = workers.died - died
    if died != len(run.task.deaths):
        wrong.append(f"{died} workers died, not {len(run.task.deaths)}")
    outcome = Outcome(right, len(run.task.calls), seen, [*wrong, *wrong_prompts, *wrong_calls])
    row = Row(run, outcome, died, time.monotonic() - began)
    stage.screen.say(f"{run.task.name}: {'; '.join(outcome.wrong[:SHOWN]) or 'as in the script'}")
    return row


def program(run: Run) -> list[str]:
    """Return the command of a run, prefixed so that it starts in the run's working folder. The command inherits no
    environment variable of this process, because the variables may have addresses and keys of other servers."""
    path = os.pathsep.join((str(ENVIRONMENT / "bin"), str(NODE_MODULES / ".bin"), os.defpath))
    given = {"PATH": path, "LANG": "C.UTF-8", "HOME": str(run.folder), "PYTHONPATH": str(ROOT), **run.environment}
    return ["env", "-i", "-C", str(run.folder), *(f"{name}={value}" for name, value in given.items()), *run.command]


def _since(log: Path, offset: int) -> list[str]:
    with log.open("rb") as file:
        file.seek(offset)
        return file.read().decode().splitlines()


def judge(run: Run, output: Path) -> tuple[int, list[str]]:
    """Return the number of calls that were made as in the script, and a message for each fault in calls, files and
    final text.

    A coding agent's calls are judged by the files that they leave: either all calls count as right, or none.
    """
    if run.record is None:
        wrong = judge_files(run.folder)
        final, right = output.read_text(errors="replace"), 0 if wrong else len(run.task.calls)
    else:
        lines = [json.loads(line) for line in run.record.read_text().splitlines()] if run.record.exists() else []
        right, wrong = judge_calls(run.task.calls, [Call(**line) for line in lines if "name" in line])
        final = "".join(line["final"] for line in lines if "final" in line)
    if run.task.final.text not in final:
        wrong.append(f"the last text is not that of the script: {final[-500:]!r}")
    return right, wrong


# -- the report


def calls_by_outcome(samples: Iterable[tuple[str, Mapping[str, str], float]]) -> dict[str, int]:
    """Return the number of calls that ended, by API and outcome, from the samples of a gateway's metrics."""
    out: Counter[str] = Counter()
    for name, labels, value in samples:
        if name == "headrace_requests_total":
            out[f"{labels['api']} {labels['outcome']}"] += int(value)
    return dict(out)


def figures(rows: Sequence[Row], outcomes: Mapping[str, int]) -> list[Figure]:
    """Return the report's rows for this part. `outcomes`: number of calls by API and outcome, as calls_by_outcome
    returns it."""
    values = {
        RAN: len(rows),
        CLIENTS: len({row.run.client for row in rows}),
        FINISHED: sum(1 for row in rows if not row.outcome.wrong),
        WRONG_CALLS: sum(row.outcome.calls - row.outcome.calls_right for row in rows),
        REPEATED: sum(row.outcome.requests.repeated for row in rows),
        REFUSED: sum(count for name, count in outcomes.items() if not name.endswith(f" {CallOutcome.OK.value}")),
        DIED: sum(row.died for row in rows),
        RESUMED: sum(row.outcome.requests.resumed for row in rows),
    }
    return [exact(name, values[name], bound) for name, bound in ROWS.items()]


def table(rows: Sequence[Row]) -> Table:
    """Return the table of all runs."""
    out = Table(
        "client", "API", "streamed", "turns", "calls right", "repeated", "other requests", "workers died", "s", "result"
    )
    for row in rows:
        run, outcome = row.run, row.outcome
        out.add_row(
            run.version, run.api, "yes" if run.stream else "no", f"{outcome.requests.turns} of {TURNS + 1}",
            f"{outcome.calls_right} of {outcome.calls}", f"{outcome.requests.repeated}", f"{outcome.requests.side}",
            f"{row.died}", f"{row.seconds:.0f}", "wrong" if outcome.wrong else "right",
        )  # fmt: skip
    return out
