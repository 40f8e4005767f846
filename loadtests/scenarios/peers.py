"""Comparison of our stack with other serving stacks. They run one after the other, on one tiny model with
one set of engine settings.

vLLM's own OpenAI server runs alone (a) and behind vllm-router (b), SMG (c) and LiteLLM (d). Ray Serve's
own gRPC proxy and its direct ingress (e) run in front of a plain vLLM deployment. Our stack (f, g, h) is
a gateway process and a worker process. The worker consists of the parts of the Ray replica, but runs
without Ray's processes. Engines and their ranks are bound to one core, all front ends and the driver to
another core. The rows that need no engine are measured by the scenarios relay, longprompt, startup and
processes.

With `--adapters SHARE`, this share of the calls names one of eight adapters. Then only our side and
vLLM's server (alone and behind vllm-router) run; the other peers and the rows without an engine are left
out.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Awaitable, Callable, Mapping
from contextlib import AsyncExitStack
from pathlib import Path

import psutil

from cluster.api.adapters import full_name
from loadtests import peers
from loadtests.adapters import rig
from loadtests.children import DidNotStart
from loadtests.datasets import fixed
from loadtests.driver import Limits
from loadtests.faces.base import Face, Request
from loadtests.faces.grpc_lean import GrpcLean
from loadtests.faces.grpc_stream import GrpcStream
from loadtests.faces.openai_sse import OpenAiSse
from loadtests.figures import Bound, Figure, missing, ratio_figure
from loadtests.processes import ENGINE, classify, pin, pin_driver
from loadtests.report import Arm, Round
from loadtests.scenarios import longprompt, processes, relay, startup
from loadtests.scenarios.common import Contestant, Stage, alternate, cores, first_call, per_round, rounds_of, unbind
from loadtests.scenarios.relay import GRPC, HTTP, SESSION
from loadtests.serving import ours as serving
from loadtests.serving import ray_serve
from loadtests.sim.adapters import AdapterMix

SERVER, ROUTER, SMG, LITELLM = "vLLM server", "vllm-router", "SMG", "LiteLLM"
RAY_PROXY, RAY_DIRECT = "Ray Serve proxy", "Ray Serve direct ingress"
LEAN = "ours StreamChat, lean client"
"""Arm for a single stream only. The HTTP client of the peers runs on the driver's loop, but grpcio's client uses
threads of its own, so this arm has a client on the loop.
"""
SERVER_LONE = "vLLM server, its rank in its core"
"""Arm for a single stream only. Like our engine, this vLLM server runs a single rank on CPUs in the process of the
engine core (cluster/worker/engine/vllm/cpu/lone_rank.py).
"""
STREAMS, CALLS, TOKENS, PROMPT_WORDS = 64, 128, 96, 24
ONE, ONE_CALLS, ONE_TOKENS = "one stream: ", 20, 4
LIMITS = Limits(call_s=120.0, run_s=300.0)
NOT_ASKED = "not selected, or out of time"
SINGLES_SHARE = 0.35
"""Share of the remaining time, if the time is bounded, for the rounds with one stream. These rounds come before the
rounds with 64 streams.
"""
COOLDOWN_S = 1.5
"""Pause between two arms in seconds. vLLM's rank processes poll at full speed for a second after their last step, on
the same core as the ranks of the next arm.
"""
ENGINE_ARGUMENTS: dict[str, object] = {
    "dtype": "float32",
    "max_model_len": 2048,
    "max_num_seqs": 64,
    "max_num_batched_tokens": 2048,
    "block_size": 32,
    "kv_cache_memory_bytes": 256 << 20,
    "enforce_eager": True,
}
ADAPTERS = 8
WITH_ADAPTERS = (SERVER, ROUTER, GRPC, HTTP, SESSION)
"""Arms that run if calls name adapters."""
LORA: Mapping[str, object] = {
    "enable_lora": True, "max_loras": ADAPTERS, "max_cpu_loras": ADAPTERS, "max_lora_rank": 8,
}  # fmt: skip
_ONE = Bound("<=", 1.0)
_B, _A = "against vllm-router", "ours StreamChat"
ROWS: tuple[tuple[str, str, str, str, Bound | None], ...] = (
    (f"front-end CPU per streamed token, 64 streams, {_A} {_B}", GRPC, ROUTER, "front", Bound("<=", 0.60)),
    (f"CPU per token of the whole serving side, {_A} {_B}", GRPC, ROUTER, "whole", Bound("<=", 0.90)),
    (f"front-end CPU per token, {_A} against Ray Serve's proxy", GRPC, RAY_PROXY, "front", Bound("<=", 0.08)),
    (f"TTFT p50 at one stream, {_A} against vLLM's server alone", ONE + GRPC, ONE + SERVER, "p50", _ONE),
    (f"the same, {_A} by a client on the driver's own loop", ONE + LEAN, ONE + SERVER, "p50", _ONE),
    (f"the first of these against {SERVER_LONE}", ONE + GRPC, ONE + SERVER_LONE, "p50", None),
    (f"the second of these against {SERVER_LONE}", ONE + LEAN, ONE + SERVER_LONE, "p50", None),
    (f"TTFT p50 at 64 streams, {_A} {_B}", GRPC, ROUTER, "p50", Bound("<=", 0.75)),
    (f"TTFT p99 at 64 streams, {_A} {_B}", GRPC, ROUTER, "p99", Bound("<=", 0.75)),
    (f"TTFT p50 at 64 streams, ours HTTP {_B}, by the same client", HTTP, ROUTER, "p50", None),
    (f"TTFT p99 at 64 streams, ours HTTP {_B}, by the same client", HTTP, ROUTER, "p99", None),
    (f"TTFT p50 at 64 streams, {SERVER} without a router {_B}", SERVER, ROUTER, "p50", None),
    (f"TTFT p99 at 64 streams, {SERVER} without a router {_B}", SERVER, ROUTER, "p99", None),
    (f"tokens per CPU-second at 64 streams, {_A} {_B}", GRPC, ROUTER, "yield", Bound(">=", 1.15)),
    (f"front-end CPU per token, ours HTTP {_B}", HTTP, ROUTER, "front", Bound("<=", 0.70)),
)
_MICROSECONDS, _MILLISECONDS = (1e6, "µs/token"), (1e3, "ms")
UNITS: dict[str, tuple[float, str]] = {
    "front": _MICROSECONDS,
    "whole": _MICROSECONDS,
    "p50": _MILLISECONDS,
    "p99": _MILLISECONDS,
    "yield": (1.0, "tokens/s"),
}
Start = Callable[[], Awaitable[tuple[Face, list[tuple[int, str]]]]]


def value_of(kind: str) -> Callable[[Round], float | None]:
    """Return a function that computes, from a round, the value for rows of this kind."""
    if kind in ("p50", "p99"):
        return lambda round_: round_.run.quantile("ttft_s", float(kind[1:]))

    def cpu(round_: Round) -> float | None:
        seconds = round_.usage.front_end_s() if kind == "front" else round_.usage.whole_s()
        if not round_.run.tokens or not seconds:
            return None
        return round_.run.tokens / seconds if kind == "yield" else seconds / round_.run.tokens

    return cpu


class TestBed:
    """The measured servers (arms) of this scenario, collected as they start. If a server does not start, the problem is
    recorded."""

    def __init__(self, stage: Stage, stack: AsyncExitStack) -> None:
        self.stage = stage
        self.stack = stack
        self.arms: list[Contestant] = []
        self.singles: list[Contestant] = []
        """Arms that run with a single stream only."""
        setup = stage.options.setup
        self.engine: Mapping[str, object] = ENGINE_ARGUMENTS if setup is None else setup.engine
        share = stage.options.adapters
        self.mix = None if share is None else AdapterMix(share, ADAPTERS)
        """The share of calls that name adapters, and these adapters; None if no call names one."""
        self.adapters: Path | None = None
        """Folder of the base model and its adapters, as rig.prepare writes it; None if no call names one."""
        self.gpus = 0 if setup is None else setup.gpus
        self.environment = {
            "HF_HUB_OFFLINE": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_LOGGING_LEVEL": "WARNING",
            "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
            "RAY_USAGE_STATS_ENABLED": "0",
        }
        if (plan := cores(stage.options.pin)) is not None:
            self.environment["VLLM_CPU_OMP_THREADS_BIND"] = ",".join(map(str, plan[0]))

    def selects(self, name: str) -> bool:
        """Return whether an arm (a measured server) is to run."""
        return self.stage.options.selects(name) and (self.mix is None or name in WITH_ADAPTERS)

    def requests(self, count: int, tokens: int, seed: int) -> list[Request]:
        """Return the calls of a round. A share of the calls names adapters."""
        requests, mix = fixed(count, PROMPT_WORDS, tokens, seed), self.mix
        if mix is None:
            return requests
        return [
            dataclasses.replace(request, model=full_name(serving.MODEL, adapter)) if adapter else request
            for request in requests
            for adapter in (mix.adapter_of(request.key),)
        ]

    async def add(self, name: str, description: str, start: Start) -> None:
        """Start an arm (a measured server) and wait for its first answer. If there is no answer, record the problem."""
        if not self.selects(name):
            return
        arm: Arm = self.stage.arm(name, description)
        self.stage.screen.say(f"starting {name}")
        try:
            face, roots = await start()
        except (DidNotStart, peers.NoPeers) as error:
            arm.problem = str(error)
            return
        self.stack.push_async_callback(face.close)
        contestant = Contestant(arm, face, roots)
        if await first_call(contestant, fixed(1, PROMPT_WORDS, 4, self.stage.options.seed)[0]):
            self.arms.append(contestant)

    def bind(self) -> str:
        """Bind the engines to one core, and the front ends and the driver to other cores. Return a text that says which
        cores these are, or that nothing was bound."""
        plan = cores(self.stage.options.pin)
        if plan is None:
            return "nothing was bound to cores"
        engines, others, driver = plan
        for root in {root for arm in (*self.arms, *self.singles) for root, _ in arm.roots}:
            pin(root, others)
            for process in (psutil.Process(root), *psutil.Process(root).children(recursive=True)):
                if classify(" ".join(process.cmdline()), "") in ENGINE:
                    pin(process.pid, engines)
        pin_driver(driver)
        return f"engines on {engines}, front ends on {others}, driver on {driver}"


async def play(stage: Stage) -> None:
    """Measure the servers that need a real engine, then the parts of the scenario that need none."""
    setup = stage.options.setup
    kind = str(setup.model) if setup is not None and setup.model is not None else "llama"
    async with AsyncExitStack() as stack:
        bed = TestBed(stage, stack)
        if bed.mix is None:
            model, bundle = await serving.prepare(stage.children, kind, stage.folder)
        else:
            folder = bed.adapters = await rig.prepare(stage, ADAPTERS)
            model, bundle, bed.engine = folder / "model", folder / "bundle", {**bed.engine, **LORA}
        await _with_vllm_server(bed, model)
        if not bed.gpus:
            await _lone_server(bed, model)
        await _ours(bed, model, bundle)
        async with AsyncExitStack() as proxy:
            await _ray(bed, proxy, RAY_PROXY, model, direct_ingress=False)
            await _rounds(bed)
        bed.arms = [arm for arm in bed.arms if arm.arm.name == GRPC]
        if bed.selects(RAY_DIRECT):
            unbind()
            await _ray(bed, stack, RAY_DIRECT, model, direct_ingress=True)
            await _rounds(bed, part="beside direct ingress: ")
        for child in stage.children.started:
            await child.stop()
    if setup is None and stage.options.adapters is None:
        await _parts(stage)


async def _with_vllm_server(bed: TestBed, model: Path) -> None:
    stage, name = bed.stage, serving.MODEL
    environment = stage.options.peers
    if not any(bed.selects(arm) for arm in (SERVER, ROUTER, SMG, LITELLM)):
        return
    engine = dict(bed.engine)
    if bed.adapters is not None:
        # with all slots full, vLLM on CPUs computes the base model with an adapter (docs/adapters.md)
        engine |= {"max_loras": ADAPTERS + 1, "max_cpu_loras": ADAPTERS + 1}
        engine["lora_modules"] = rig.modules(bed.adapters, ADAPTERS)
    try:
        server, port = await peers.vllm_server(stage.children, name, model, engine, bed.environment)
    except DidNotStart as error:
        for arm in (SERVER, ROUTER, SMG, LITELLM):
            stage.arm(arm, "vLLM's own server, or a router in front of it").problem = str(error)
        return
    behind = (server.child.pid, server.child.kind)

    def before(
        start: Callable[[], Awaitable[peers.Peer]],
    ) -> Start:
        async def started() -> tuple[Face, list[tuple[int, str]]]:
            peer = await start()
            return OpenAiSse(peer.url, name), [(peer.child.pid, peer.child.kind), behind]

        return started

    async def alone() -> tuple[Face, list[tuple[int, str]]]:
        return OpenAiSse(server.url, name), [behind]

    await bed.add(SERVER, "vLLM's own OpenAI server, no gateway", alone)
    await bed.add(
        ROUTER, "vllm-router, cache aware, in front of that server",
        before(lambda: peers.vllm_router(stage.children, environment, port)),
    )  # fmt: skip
    await bed.add(
        SMG, "SMG, cache aware, in front of that server",
        before(lambda: peers.smg(stage.children, environment, port, model)),
    )  # fmt: skip
    await bed.add(
        LITELLM, "LiteLLM's proxy, one worker, in front of that server",
        before(lambda: peers.litellm(stage.children, environment, port, name, stage.folder)),
    )  # fmt: skip


async def _ours(bed: TestBed, model: Path, bundle: Path) -> None:
    stage = bed.stage
    if not any(stage.options.selects(arm) for arm in (GRPC, HTTP, SESSION)):
        return
    arguments = {name: value for name, value in bed.engine.items() if name != "enforce_eager"}
    try:
        ours = await serving.start(
            stage.children, stage.folder, bundle=bundle, source=str(model), engine=arguments,
            environment=bed.environment,
        )  # fmt: skip
    except DidNotStart as error:
        for arm in (GRPC, HTTP, SESSION):
            stage.arm(arm, "ours").problem = str(error)
        return
    if bed.adapters is not None:
        await bed.stack.enter_async_context(rig.declared(ours, bed.adapters, rig.names(ADAPTERS)))
    for contestant in relay.our_arms(stage, ours):
        bed.stack.push_async_callback(contestant.face.close)
        if await first_call(contestant, fixed(1, PROMPT_WORDS, 4, stage.options.seed)[0]):
            bed.arms.append(contestant)
    if stage.options.selects(GRPC):
        lean = GrpcLean(ours.grpc, ours.model, metadata=ours.metadata)
        bed.stack.push_async_callback(lean.close)
        single = stage.report.arm(ONE + LEAN, "the same over the same port, without grpcio in the driver")
        bed.singles.append(Contestant(single, lean, ours.roots))


async def _lone_server(bed: TestBed, model: Path) -> None:
    stage = bed.stage
    if not bed.selects(SERVER_LONE):
        return
    stage.screen.say(f"starting {SERVER_LONE}")
    single = stage.report.arm(ONE + SERVER_LONE, "VLLM_ENABLE_V1_MULTIPROCESSING=0, which CpuPlatform reads")
    environment = {**bed.environment, "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "OMP_NUM_THREADS": "1"}
    try:
        server, _ = await peers.vllm_server(stage.children, serving.MODEL, model, bed.engine, environment)
    except DidNotStart as error:
        single.problem = str(error)
        return
    face = OpenAiSse(server.url, serving.MODEL)
    bed.stack.push_async_callback(face.close)
    bed.singles.append(Contestant(single, face, [(server.child.pid, server.child.kind)]))


async def _ray(bed: TestBed, stack: AsyncExitStack, name: str, model: Path, *, direct_ingress: bool) -> None:
    async def start() -> tuple[Face, list[tuple[int, str]]]:
        serving_ray = await stack.enter_async_context(
            ray_serve.running(
                bed.stage.children, name.lower().replace(" ", "-"), model, bed.engine, bed.environment,
                direct_ingress=direct_ingress, gpus=bed.gpus,
            )
        )  # fmt: skip
        face = GrpcStream(serving_ray.address, serving.MODEL, metadata=serving_ray.metadata)
        return face, serving_ray.roots

    await bed.add(name, "Ray Serve over a plain AsyncLLM deployment, messages of the same proto over its gRPC", start)


async def _rounds(bed: TestBed, part: str = "") -> None:
    """Run rounds with 64 concurrent streams and add the results to the report. In each round, all arms (measured
    servers) take turns.

    `part`: prefix of the names of the added rows. If it is "", rounds with one stream are run first.
    """
    stage, options = bed.stage, bed.stage.options
    rounds, streams = rounds_of(options), options.concurrency or STREAMS
    stage.report.settings[f"{part}cores"] = bed.bind()
    singles: list[Contestant] = []
    if not part:
        stage.report.settings |= {"engine": dict(bed.engine), "streams": streams, "rounds": rounds}
        for arm in bed.arms:
            single = stage.report.arm(ONE + arm.arm.name, arm.arm.description)
            singles.append(Contestant(single, arm.face, arm.roots))
        singles += bed.singles
        await alternate(
            stage.with_share_of_time(SINGLES_SHARE), singles,
            lambda number: bed.requests(ONE_CALLS, ONE_TOKENS, options.seed * 2000 + number),
            rounds=rounds, concurrency=1, limits=LIMITS, cooldown_s=COOLDOWN_S, share_engines=True,
        )  # fmt: skip
    turns = bed.arms
    if part:
        turns = [dataclasses.replace(arm, arm=_renamed(stage, arm, part), runs=[]) for arm in bed.arms]

    def requests_of(number: int) -> list[Request]:
        return bed.requests(CALLS, options.tokens or TOKENS, options.seed * 1000 + number)

    await alternate(
        stage, turns, requests_of,
        rounds=rounds, concurrency=streams, limits=LIMITS, cooldown_s=COOLDOWN_S, share_engines=True,
    )  # fmt: skip
    if not part:
        stage.report.figures += figures({arm.arm.name: arm for arm in (*bed.arms, *singles)}, stage)


def _renamed(stage: Stage, contestant: Contestant, part: str) -> Arm:
    """Return the arm (measured server) for a contestant's results in `part` of the scenario. Our gRPC arm gets a new
    name with the prefix `part`, because it also runs in another part."""
    if contestant.arm.name != GRPC:
        return contestant.arm
    return stage.report.arm(part + contestant.arm.name, contestant.arm.description)


def figures(arms: dict[str, Contestant], stage: Stage) -> list[Figure]:
    """Return the rows that need an engine, in the order of the table ROWS."""
    problems = {arm.name: arm.problem for arm in stage.report.arms}
    out = []
    for title, ours, theirs, kind, bound in ROWS:
        pairs = per_round(arms.get(ours), arms.get(theirs), value_of(kind))
        if pairs[0]:
            scale, unit = UNITS[kind]
            out.append(ratio_figure(title, *pairs, bound, scale=scale, difference_unit=unit))
        else:
            lacking = next((name for name in (ours, theirs) if name not in arms), ours)
            why = problems.get(lacking) or problems.get(lacking.removeprefix(ONE)) or NOT_ASKED
            out.append(missing(title, bound, f"{lacking} did not run: {why.splitlines()[0]}"))
    return out


async def _parts(stage: Stage) -> None:
    """Measure the rows that need no engine, by running four other scenarios: relay, longprompt, startup and processes.
    A part that does not start is reported as a problem."""
    for name, part in (("relay", relay), ("longprompt", longprompt), ("startup", startup), ("processes", processes)):
        unbind()
        folder = stage.folder / name
        folder.mkdir()
        try:
            await part.play(dataclasses.replace(stage, part=f"{name}: ", folder=folder))
        except DidNotStart as error:
            stage.report.problems.append(f"{name}: {error}")
        for child in stage.children.started:
            await child.stop()
