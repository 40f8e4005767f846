"""The part `forced`: a real model that must call a tool, on vLLM's own server and on Headrace; the calls must be equal.

SmolLM2-135M in float32 at temperature 0 gets cases of BFCL with a required and with a named tool choice. Each side
makes a grammar of the tools, and the grammar forces the call. So equal calls show that the grammars are equal.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cluster.config.paths import cache_dir
from cluster.worker.weights.demo_model import DemoModelError, ensure_demo_model
from loadtests import peers
from loadtests.agents import cases, servers
from loadtests.agents.bfcl import MODES, mixed
from loadtests.agents.cases import Case
from loadtests.agents.compare import Answer, Server, differences, known_finish
from loadtests.children import Children
from loadtests.figures import Bound, Figure
from loadtests.scenarios.common import Stage
from loadtests.scenarios.parts import exact
from loadtests.serving import ours as serving
from loadtests.traces import NoData

CASES, TOKENS, CONCURRENCY = 10, 96, 2
MODEL, TOOLS = "smollm2", "hermes"
COMPARED = "answers with a required or named call, SmolLM2 in float32, whole and streamed"
CALLED = "answers of vLLM's server among them with a tool call"
DIFFERENT = "answers among them that differ from vLLM's own server"
ROWS: Mapping[str, Bound | None] = {COMPARED: Bound(">=", 40), CALLED: None, DIFFERENT: Bound("<=", 0)}
LONE_RANK = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
"""Environment with which vLLM's rank on CPUs runs in the process of the engine core, as in Headrace's engine."""
ENGINE: Mapping[str, object] = {
    "dtype": "float32",
    "max_model_len": 4096,
    "max_num_seqs": 8,
    "max_num_batched_tokens": 4096,
    "block_size": 32,
    "kv_cache_memory_bytes": 512 << 20,
}


def bodies(chosen: Sequence[Case]) -> list[tuple[str, dict[str, Any]]]:
    """Return the requests, each as (name, body). Each case has four requests: the tool choice is `required` or names a
    function, and the answer is whole or streamed."""
    out = []
    for case in chosen:
        first = case.tools[0]["function"]["name"]
        choices = {"required": "required", "named": {"type": "function", "function": {"name": first}}}
        for choice, value in choices.items():
            for mode, stream in MODES.items():
                body = {
                    "model": MODEL, "messages": [{"role": "user", "content": case.question}], "tools": case.tools,
                    "tool_choice": value, "temperature": 0, "max_tokens": TOKENS, "stream": stream,
                }  # fmt: skip
                out.append((f"{case.name}, {choice}, {mode}", body))
    return out


async def measure(stage: Stage) -> list[Figure]:
    """Run the comparison and return the report's rows. Raises NoData if BFCL's data or the model is missing. Raises
    DidNotStart if a server does not start."""
    count = min(CASES, stage.options.cases or CASES)
    with_calls = [case for case in mixed(cases.load(), None, stage.options.seed) if case.calls]
    short = sorted(with_calls, key=lambda case: len(str(case.tools)))  # long schemas would not end within TOKENS
    requests = bodies(short[:count])
    try:
        source = await asyncio.to_thread(ensure_demo_model, cache_dir())
    except DemoModelError as error:
        raise NoData(str(error)) from error
    folder, bundle = await serving.prepare(stage.children, str(source), stage.folder)
    theirs = await _ask_vllm(stage.children, folder, requests)
    ours = await _ask_headrace(stage, folder, bundle, requests)
    wrong = {}
    for (name, body), one, other in zip(requests, theirs, ours, strict=True):
        known = known_finish(one, other, is_cut=other.finish == "length", is_named=body["tool_choice"] != "required")
        if found := [each for each in differences(one, other) if not (known and each.field == "finish")]:
            wrong[name] = [(each.field, each.theirs, each.ours) for each in found]
            stage.screen.say(f"differs: {name}: {wrong[name]}")
    stage.report.settings |= {"forced: engine": dict(ENGINE), "forced: differences": wrong}
    values = {COMPARED: len(requests), CALLED: sum(1 for one in theirs if one.calls), DIFFERENT: len(wrong)}
    return [exact(name, values[name], bound) for name, bound in ROWS.items()]


async def _ask_vllm(
    children: Children, folder: Path, requests: Sequence[tuple[str, Mapping[str, Any]]]
) -> list[Answer]:
    engine = {**ENGINE, "enforce_eager": True, "enable_auto_tool_choice": True, "tool_call_parser": TOOLS}
    peer, port = await peers.vllm_server(children, MODEL, folder, engine, servers.ENVIRONMENT | LONE_RANK)
    answers = await _ask(Server(port), requests)
    await peer.child.stop()
    return answers


async def _ask_headrace(
    stage: Stage, folder: Path, bundle: Path, requests: Sequence[tuple[str, Mapping[str, Any]]]
) -> list[Answer]:
    entry: dict[str, Any] = {"name": MODEL, "folder": str(folder), "bundle": str(bundle)}
    entry |= {"tools": TOOLS, "reasoning": "", "engine": dict(ENGINE)}
    side = await servers.start_headrace(stage.children, stage.folder, [entry], stage.options.seed, "forced")
    return await _ask(side.servers[MODEL], requests)


async def _ask(server: Server, requests: Sequence[tuple[str, Mapping[str, Any]]]) -> list[Answer]:
    """Make calls, CONCURRENCY at a time; return the answers in the order of the calls."""
    free = asyncio.Semaphore(CONCURRENCY)

    async def ask(body: Mapping[str, Any]) -> Answer:
        async with free:
            return await server.ask(body)

    try:
        return await asyncio.gather(*(ask(body) for _, body in requests))
    finally:
        server.close()
