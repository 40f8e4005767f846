"""Relay: CPU cost of passing on a streamed token from the engine to the caller.

A simulated engine with steps of 20 ms has 256 streams. Our gateway and vllm-router relay such streams in alternating
rounds. Our gateway receives the tokens over a link, and sends them over gRPC, HTTP or gRPC sessions; vllm-router
receives and sends SSE. The relaying processes are bound to one core, and the engines and the driver to another.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from cluster.config.gateway import Listen
from cluster.process.ports import free_port
from loadtests import peers
from loadtests.children import Child, DidNotStart
from loadtests.datasets import fixed
from loadtests.driver import Limits
from loadtests.faces import Request
from loadtests.faces.grpc_stream import GrpcStream
from loadtests.faces.openai_sse import OpenAiSse
from loadtests.faces.session import Sessions
from loadtests.figures import Bound, Figure, missing, ratio_figure
from loadtests.processes import SIMULATED, pin, pin_driver
from loadtests.report import Round
from loadtests.scenarios.common import Contestant, Stage, alternate, cores, first_call, per_round, rounds_of
from loadtests.serving import ours as serving

STREAMS, TOKENS, PROMPT_WORDS, STEP_MS = 256, 128, 24, 20
SESSIONS = 16
LEAST_ONE_TOKEN_SHARE = 0.95
LIMITS = Limits(call_s=60.0, run_s=120.0)

GRPC, HTTP, SESSION, ROUTER = "ours StreamChat", "ours HTTP", "ours Session", "vllm-router"
RESUMABLE = "ours StreamChat, resumable"
NAMES = {
    GRPC: "gateway CPU per relayed token, ours over gRPC against vllm-router",
    HTTP: "gateway CPU per relayed token, ours over HTTP against vllm-router",
    SESSION: f"gateway CPU per relayed token, ours over {SESSIONS} sessions against vllm-router",
}
BOUNDS = {GRPC: Bound("<=", 1.8), HTTP: Bound("<=", 1.1), SESSION: Bound("<=", 0.65)}
TOKENS_COST = "gateway CPU per relayed token, ours over gRPC with resume tokens against without"
TOKENS_BOUND = Bound("<=", 1.5)
CLIENT = "client CPU per token, ours over sessions against ours over gRPC"
CLIENT_BOUND = Bound("<=", 0.4)


def sim_source(model: Path, seed: int) -> str:
    """Return the model source of the simulated engines behind our gateway and behind vllm-router. The engines have
    capacity for every stream, and prefill takes almost no time."""
    room = f"max_num_seqs={STREAMS}&max_num_batched_tokens=65536&kv_blocks=65536"
    speed = f"decode_ms={STEP_MS}&prefill_tokens_per_s=100000000"
    return f"sim://{model}?{speed}&max_model_len=4096&{room}&seed={seed}&{serving.plain_tokens(model)}"


def our_arms(stage: Stage, ours: serving.Ours, names: Sequence[str] = (GRPC, HTTP, SESSION)) -> list[Contestant]:
    """Return an arm (a measured server and protocol) for each of our APIs with these names. An arm is left out if this
    build lacks the API or the options do not select it."""
    roots, wanted = ours.roots, [name for name in names if stage.options.selects(name)]
    arms: list[Contestant] = []
    if GRPC in wanted:
        arm = stage.arm(GRPC, "gateway process and worker process over the link; one gRPC stream a call")
        arms.append(Contestant(arm, GrpcStream(ours.grpc, ours.model, metadata=ours.metadata), roots))
    if RESUMABLE in wanted:
        arm = stage.arm(RESUMABLE, "the same, each chunk with a resume token, as the SDK asks for")
        face = GrpcStream(ours.grpc, ours.model, metadata=ours.metadata, resumable=True)
        arms.append(Contestant(arm, face, roots))
    if HTTP in wanted and ours.http:
        arm = stage.arm(HTTP, "the same gateway; OpenAI's server-sent events, one kept-alive connection a call")
        arms.append(Contestant(arm, OpenAiSse(ours.http, ours.model, api_key=ours.key), roots))
    if SESSION in wanted:
        arm = stage.arm(SESSION, f"the same gateway; {SESSIONS} Inference.Session streams carry all calls")
        sessions = Sessions(ours.grpc, ours.model, sessions=SESSIONS, metadata=ours.metadata)
        arms.append(Contestant(arm, sessions, roots))
    return arms


async def start_sse_engine(stage: Stage, bundle: Path, source: str) -> tuple[Child, int]:
    """Start the simulated engine behind an OpenAI API. Raises DidNotStart."""
    port = free_port()
    command = [sys.executable, "-m", "loadtests.serving.sse_engine", "--port", str(port), "--model", serving.MODEL]
    command += ["--bundle", str(bundle), "--source", source]
    child = stage.children.start("sse-engine", SIMULATED, command)
    await child.until(lambda: peers.answers(port, "/health"), "it listens", 60.0)
    return child, port


async def start_router(stage: Stage, port: int) -> Contestant | None:
    """Start vllm-router in front of the engine at `port`; return it as a contestant. If the router does not start,
    record the problem in the report and return None."""
    arm = stage.arm(ROUTER, "vllm-router in front of the simulated engine's OpenAI API, cache_aware")
    try:
        peer = await peers.vllm_router(stage.children, stage.options.peers, port)
    except (DidNotStart, peers.NoPeers) as error:
        arm.problem = str(error)
        return None
    return Contestant(arm, OpenAiSse(peer.url, serving.MODEL), [(peer.child.pid, peers.ROUTER)])


async def play(stage: Stage) -> None:
    """Run the scenario: start our side and the peer's side, measure them in turns, and add the results to the
    report."""
    options, report = stage.options, stage.report
    streams, tokens, rounds = options.concurrency or STREAMS, options.tokens or TOKENS, rounds_of(options)
    model, bundle = await serving.prepare(stage.children, "tokenizer", stage.folder)
    source = sim_source(model, options.seed)
    ours = await serving.start(stage.children, stage.folder, bundle=bundle, source=source, kind=SIMULATED)
    arms = our_arms(stage, ours, (GRPC, RESUMABLE, HTTP, SESSION))
    router: Contestant | None = None
    engines = [ours.worker.pid]
    if options.selects(ROUTER):
        engine, port = await start_sse_engine(stage, bundle, source)
        engines.append(engine.pid)
        router = await start_router(stage, port)
        if router is not None:
            arms.append(router)
    report.settings[f"{stage.part}streams"] = {"streams": streams, "tokens": tokens, "step_ms": STEP_MS}
    report.settings[f"{stage.part}cores"] = bind(options.pin, [root for arm in arms for root, _ in arm.roots], engines)
    try:
        ready = [arm for arm in arms if await first_call(arm, fixed(1, PROMPT_WORDS, 4, options.seed)[0])]
        await alternate(
            stage, ready, lambda number: _requests(streams, tokens, options.seed, number),
            rounds=rounds, concurrency=streams, limits=LIMITS,
        )  # fmt: skip
    finally:
        for arm in arms:
            await arm.face.close()
    report.figures += figures({arm.arm.name.removeprefix(stage.part): arm for arm in arms})


def _requests(streams: int, tokens: int, seed: int, number: int) -> list[Request]:
    return fixed(streams, PROMPT_WORDS, tokens, seed * 1000 + number)


def bind(wanted: bool, measured: Sequence[int], engines: Sequence[int]) -> str:
    """Bind three groups of processes to separate cores: relaying processes, engines, and this process. Return a
    description of the binding. If `wanted` is false or there are too few cores, nothing is bound. `measured`: pids of
    the relaying processes. `engines`: pids of the engines."""
    plan = cores(wanted)
    if plan is None:
        return "nothing was bound to cores"
    relay, engine, driver = plan
    for pid in measured:
        pin(pid, relay)
    for pid in engines:
        pin(pid, engine)
    pin_driver(driver)
    return f"relaying processes on {relay}, engines on {engine}, driver on {driver}"


def relay_cpu(round_: Round) -> float | None:
    """Return the CPU seconds per token of the relaying processes. Engines do not count, simulated or not."""
    return round_.usage.front_end_s() / round_.run.tokens if round_.run.tokens else None


def figures(arms: dict[str, Contestant]) -> list[Figure]:
    """Return the rows of this scenario, in the table's order."""
    out = []
    router = arms.get(ROUTER)
    for name in (GRPC, HTTP, SESSION):
        out.append(_relay_figure(name, arms.get(name), router))
    with_tokens, without = per_round(arms.get(RESUMABLE), arms.get(GRPC), relay_cpu)
    out.append(
        ratio_figure(TOKENS_COST, with_tokens, without, TOKENS_BOUND, scale=1e6, difference_unit="µs/token")
        if with_tokens
        else missing(TOKENS_COST, TOKENS_BOUND, "one of the two did not run")
    )
    ours, theirs = per_round(
        arms.get(SESSION), arms.get(GRPC), lambda round_: round_.run.driver_cpu_s / max(round_.run.tokens, 1)
    )
    out.append(
        ratio_figure(CLIENT, ours, theirs, CLIENT_BOUND, scale=1e6, difference_unit="µs/token")
        if ours
        else missing(CLIENT, CLIENT_BOUND, "one of the two did not run")
    )
    return out


def _relay_figure(name: str, ours: Contestant | None, router: Contestant | None) -> Figure:
    title, bound = NAMES[name], BOUNDS[name]
    if name == HTTP and "http" not in Listen.model_fields:
        return missing(title, bound, "this build's gateway has no HTTP listener")
    for arm, what in ((ours, name), (router, ROUTER)):
        if arm is None or not arm.arm.rounds:
            return missing(title, bound, f"{what} did not run{': ' + arm.arm.problem if arm else ''}")
    assert ours is not None
    values = per_round(ours, router, relay_cpu)
    shares = [round_.run.one_token_share or 0.0 for round_ in ours.arm.rounds]
    if min(shares) < LEAST_ONE_TOKEN_SHARE:
        return missing(title, bound, f"only {min(shares):.0%} of the pieces surely held one token: not comparable")
    note = f"at least {min(shares):.1%} of the pieces held one token"
    return ratio_figure(title, *values, bound, scale=1e6, difference_unit="µs/token", note=note)
