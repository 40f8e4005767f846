"""The part `strict`: a small real model must call strict tools with random schemas; the arguments must be valid.

SmolLM2-135M samples at temperature 1. So its answers differ, and without the grammar they would often violate the
schema. All strings are bounded, since a small model may fill an unbounded one up to `max_tokens`. Half of the calls run
undisturbed on two workers. During the other half a worker is killed, and its calls continue on the other worker, which
compiles the grammar again and replays the tokens so far.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Mapping, Sequence
from typing import Any

import jsonschema

from cluster.config.paths import cache_dir
from cluster.worker.weights.demo_model import DemoModelError, ensure_demo_model
from loadtests.agents import servers
from loadtests.agents.compare import Answer, Server
from loadtests.children import Child
from loadtests.figures import Bound, Figure
from loadtests.processes import own_processor
from loadtests.scenarios.common import Stage
from loadtests.scenarios.parts import exact
from loadtests.serving import ours as serving
from loadtests.traces import NoData

CALLS, TOKENS, CONCURRENCY = 500, 320, 16
MODEL, TOOLS = "smollm2", "hermes"
WORDS = ("city", "unit", "count", "name", "date", "price", "active", "tags", "owner", "limit")
PATTERNS = ("^[0-9]{4}-[0-9]{2}$", "^[A-Z]{2,5}$", "^#[0-9a-f]{6}$")
ENGINE: Mapping[str, object] = {
    "dtype": "float32",
    "max_model_len": 2048,
    "max_num_seqs": 16,
    "max_num_batched_tokens": 2048,
    "block_size": 32,
    "kv_cache_memory_bytes": 1 << 30,
}
MADE = "calls of strict tools, SmolLM2, half of them while a worker is killed"
INVALID = "answers among them that did not end by `length` and are no valid call by the schema"
LENGTH = "share of them that ended by `length`"
KILLED = "workers killed"
ROWS: Mapping[str, Bound | None] = {
    MADE: Bound(">=", CALLS),
    INVALID: Bound("<=", 0),
    LENGTH: Bound("<=", 0.02),
    KILLED: Bound(">=", 1),
}


def schema(chance: random.Random, depth: int = 2) -> dict[str, Any]:
    """Return a random JSON schema that allows only values of bounded length."""
    kinds = ("string", "integer", "boolean", "enum", "pattern", "array", "object")
    match chance.choice(kinds if depth else kinds[:5]):
        case "string":
            return {"type": "string", "maxLength": chance.randint(1, 24)}
        case "integer":
            return {"type": "integer", "minimum": 0, "maximum": 10 ** chance.randint(1, 6)}
        case "boolean":
            return {"type": "boolean"}
        case "enum":
            return {"enum": chance.sample(WORDS, chance.randint(1, 4))}
        case "pattern":
            return {"type": "string", "pattern": chance.choice(PATTERNS)}
        case "array":
            return {
                "type": "array",
                "items": schema(chance, depth - 1),
                "minItems": 1,
                "maxItems": chance.randint(1, 3),
            }
        case _:
            return parameters(chance, depth - 1)


def parameters(chance: random.Random, depth: int = 2) -> dict[str, Any]:
    """Return a random JSON schema of an object whose properties are all required."""
    names = chance.sample(WORDS, chance.randint(1, 4))
    properties = {name: schema(chance, depth) for name in names}
    return {"type": "object", "properties": properties, "required": names, "additionalProperties": False}


def body(chance: random.Random) -> dict[str, Any]:
    """Return a request with one or two strict tools."""
    tools = [
        {"type": "function", "function": {"name": f"tool_{number}", "parameters": parameters(chance), "strict": True}}
        for number in range(chance.randint(1, 2))
    ]
    question = f"Use a tool. The {chance.choice(WORDS)} is {chance.randint(1, 999)}."
    return {
        "model": MODEL, "messages": [{"role": "user", "content": question}], "tools": tools,
        "tool_choice": "required", "parallel_tool_calls": False, "temperature": 1.0, "max_tokens": TOKENS,
        "stream": chance.random() < 0.5,
    }  # fmt: skip


def why_wrong(answer: Answer, request: Mapping[str, Any]) -> str:
    """Return why an answer is wrong; "" if it is right. Do not call it for an answer with the finish reason `length`,
    which was cut off."""
    if answer.error or answer.finish != "tool_calls" or len(answer.calls) != 1:
        return answer.error or f"finish {answer.finish!r} with {len(answer.calls)} calls: {answer.content[:100]!r}"
    (call,) = answer.calls
    by_name = {tool["function"]["name"]: tool["function"]["parameters"] for tool in request["tools"]}
    if call.name not in by_name:
        return f"unknown tool {call.name!r}"
    try:
        jsonschema.validate(call.parsed, by_name[call.name])
    except jsonschema.ValidationError as error:
        return f"{call.arguments[:200]}: {error.message[:200]}"
    return ""


async def measure(stage: Stage) -> list[Figure]:
    """Run the calls and return the report's rows. Raises NoData if the model is missing, or DidNotStart."""
    count = stage.options.cases or CALLS
    chance = random.Random(stage.options.seed)
    requests = [body(chance) for _ in range(count)]
    try:
        source = await asyncio.to_thread(ensure_demo_model, cache_dir())
    except DemoModelError as error:
        raise NoData(str(error)) from error
    folder, bundle = await serving.prepare(stage.children, str(source), stage.folder)
    gateway = await servers.start_gateway(stage.children, stage.folder, [MODEL], "strict")
    entry: dict[str, Any] = {"name": MODEL, "folder": str(folder), "bundle": str(bundle), "tools": TOOLS}
    entry |= {"reasoning": "", "engine": dict(ENGINE)}
    given = {"link": gateway.endpoints["link"], "seed": stage.options.seed, "prompts": stage.folder / "strict.prompts"}
    workers = [
        await servers.start_program(
            stage.children, stage.folder, f"strict-w{number + 1}", "loadtests.agents.worker",
            {**given, "models": [{**entry, "worker": f"w{number + 1}"}]}, own_processor(number),
        )
        for number in range(2)
    ]  # fmt: skip
    server = Server(gateway.port, gateway.key)
    try:
        await workers[0].until(lambda: _lists_model(server), "the gateway lists the model", servers.READY_S)
        answers = await _ask(server, requests[: count // 2])
        killed = workers[0].process.poll() is None
        answers += await _ask(server, requests[count // 2 :], kill=workers[0], after=count // 10)
    finally:
        server.close()
    cut = [answer.finish == "length" and not answer.error for answer in answers]
    wrong = [
        why for answer, request, is_cut in zip(answers, requests, cut, strict=True)
        if not is_cut and (why := why_wrong(answer, request))
    ]  # fmt: skip
    for why in wrong[:10]:
        stage.screen.say(f"wrong: {why}")
    stage.report.settings |= {"strict: engine": dict(ENGINE), "strict: wrong": wrong}
    values = {MADE: len(answers), INVALID: len(wrong), LENGTH: sum(cut) / max(len(cut), 1), KILLED: int(killed)}
    return [exact(name, values[name], bound) for name, bound in ROWS.items()]


async def _lists_model(server: Server) -> bool:
    return MODEL in await server.ready_models()


async def _ask(
    server: Server, requests: Sequence[Mapping[str, Any]], kill: Child | None = None, after: int = 0
) -> list[Answer]:
    """Make calls, CONCURRENCY at a time; return the answers in the order of the calls. `kill`: worker that is killed
    once `after` calls have been answered, while other calls run."""
    free, answered = asyncio.Semaphore(CONCURRENCY), 0

    async def ask(request: Mapping[str, Any]) -> Answer:
        nonlocal answered
        async with free:
            answer = await server.ask(request)
        answered += 1
        if kill is not None and answered == max(after, 1):
            kill.process.kill()
        return answer

    return list(await asyncio.gather(*map(ask, requests)))
