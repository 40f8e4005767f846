"""The part `tool_tokens`: the cost of a streamed token when requests have tools, compared with vLLM's own server.

64 streams run at once. Both sides have vLLM's own engine core in a separate process. Its executor emits the same tokens
every 20 ms: some text, then the expected calls of a case of BFCL, in the format of Hermes and Qwen. Every request has
the case's tools and the tool choice auto. The part measures all CPU time except the engine core's. On vLLM's side this
is the server process with parser and detokenizer, without a router. On Headrace's side it is the gateway, its helpers,
the worker and the worker's parser process.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping, Sequence
from typing import Any

import psutil

from loadtests.agents import cases, cores
from loadtests.agents.bfcl import mixed
from loadtests.agents.bodies import PreparedBodies
from loadtests.agents.cases import Case
from loadtests.agents.conversations import ANSWER_CHARS
from loadtests.agents.formats import BY_NAME
from loadtests.agents.scripted import MARK
from loadtests.datasets import prose
from loadtests.driver import Limits
from loadtests.faces.base import Request
from loadtests.figures import Bound, Figure, missing, ratio_figure
from loadtests.processes import ENGINE, classify, pin, pin_driver
from loadtests.scenarios.common import (
    Contestant,
    Stage,
    alternate,
    first_call,
    per_round,
    rounds_of,
)
from loadtests.scenarios.common import (
    cores as planned_cores,
)
from loadtests.scenarios.relay import relay_cpu
from loadtests.serving import ours as serving

STREAMS, STEP_MS, MAX_TOKENS = 64, 20.0, 2048
FAMILY, FORMAT = "byte-level", BY_NAME["hermes"]
CATEGORIES = ("simple_python", "multiple", "parallel")
TITLE = "front-end CPU a streamed token with tools on, 64 streams, against vLLM's own server with tools on"
BOUND = Bound("<=", 0.8)
ROWS: Mapping[str, Bound | None] = {TITLE: BOUND}
OURS, SERVER = "ours HTTP, tools on", "vLLM server, tools on"
PARSER: Mapping[str, object] = {"tool_call_parser": FORMAT.tools, "max_model_len": 32_768}
LIMITS = Limits(call_s=120.0, run_s=240.0)


def texts(chosen: Sequence[Case]) -> dict[str, str]:
    """Return the text that the engine emits for each case: prose, followed by the case's tool calls. The keys are the
    numbers of the cases."""
    return {
        str(number): prose(f"said/{number}", ANSWER_CHARS) + "\n" + FORMAT.write(case.calls)
        for number, case in enumerate(chosen)
    }


def body(number: int, case: Case) -> bytes:
    """Return the HTTP body of the request for a case."""
    value: dict[str, Any] = {
        "model": serving.MODEL,
        "messages": [{"role": "user", "content": f"{case.question}\n{MARK.format(number)}"}],
        "tools": case.tools,
        "tool_choice": "auto",
        "temperature": 0,
        "max_tokens": MAX_TOKENS,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    return json.dumps(value).encode()


async def measure(stage: Stage) -> list[Figure]:
    """Measure vLLM's own server and our cluster in turn, and return the report's row. Raises NoData if BFCL's data is
    missing, and DidNotStart if a server does not start."""
    streams, rounds = stage.options.concurrency or STREAMS, rounds_of(stage.options)
    chosen = mixed(cases.load(categories=CATEGORIES), streams, stage.options.seed)
    spoken = texts(chosen)
    made = await cores.write_models(stage.children, stage.folder, {FAMILY: spoken}) / FAMILY
    lengths = {key: len(ids) for key, ids in json.loads((made / "scripts.json").read_text()).items()}
    bodies = {f"{number}": body(number, case) for number, case in enumerate(chosen)}
    requests = [Request(key, "", lengths[key]) for key in bodies]
    with_tools = {**PARSER, "enable_auto_tool_choice": True}
    (server, _), ours = await asyncio.gather(
        cores.start_server(stage.children, made, STEP_MS, with_tools),
        cores.start_ours(stage.children, stage.folder, made, STEP_MS, PARSER, "tool-tokens"),
    )
    arms = [
        Contestant(
            stage.arm(OURS, "gateway, worker and its parser process; Hermes' parser"),
            PreparedBodies(ours.http, bodies, api_key=ours.key), ours.roots,
        ),
        Contestant(
            stage.arm(SERVER, "vLLM's own OpenAI server, no gateway; Hermes' parser"),
            PreparedBodies(server.url, bodies), [(server.child.pid, server.child.kind)],
        ),
    ]  # fmt: skip
    stage.report.settings["tool_tokens"] = {
        "streams": streams, "step_ms": STEP_MS, "tokens": sum(lengths.values()),
        "cores": bind(stage, arms),
    }  # fmt: skip
    try:
        ready = [arm for arm in arms if await first_call(arm, requests[0])]
        await alternate(
            stage, ready, lambda number: requests, rounds=rounds, concurrency=streams, limits=LIMITS
        )  # fmt: skip
    finally:
        for arm in arms:
            await arm.face.close()
    return [figure(*arms)]


def bind(stage: Stage, arms: Sequence[Contestant]) -> str:
    """Bind processes to CPU cores: the front ends, vLLM's engine processes and the driver each get cores of their own.
    Returns a description of the result."""
    plan = planned_cores(stage.options.pin)
    if plan is None:
        return "nothing was bound to cores"
    front, engines, driver = plan
    for root in {root for arm in arms for root, _ in arm.roots}:
        pin(root, front)
        for process in (psutil.Process(root), *psutil.Process(root).children(recursive=True)):
            if classify(" ".join(process.cmdline()), "") in ENGINE:
                pin(process.pid, engines)
    pin_driver(driver)
    return f"front ends on {front}, engine cores on {engines}, driver on {driver}"


def figure(ours: Contestant, theirs: Contestant) -> Figure:
    """Return the report's row."""
    for arm in (ours, theirs):
        if not arm.arm.rounds:
            return missing(TITLE, BOUND, f"{arm.arm.name} did not run: {arm.arm.problem}")
    pieces = [
        sum(record.pieces for round_ in arm.arm.rounds for record in round_.run.good)
        / max(sum(round_.run.tokens for round_ in arm.arm.rounds), 1)
        for arm in (ours, theirs)
    ]
    note = f"pieces a token: {pieces[0]:.2f} and {pieces[1]:.2f}; the engine core is a process apart on both sides"
    return ratio_figure(
        TITLE, *per_round(ours, theirs, relay_cpu), BOUND, scale=1e6, difference_unit="µs/token", note=note
    )
