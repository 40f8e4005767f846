"""Measurement of how many streams finish although a backend is killed, for three front ends: a Headrace gateway,
vllm-router and Ray Serve's gRPC proxy.

Each front end has two backends, and all backends use the same simulated engine: Headrace's workers, plain OpenAI
servers, and replicas of a plain deployment. In a round all streams begin together; when each stream has received some
pieces, one backend gets SIGKILL. A stream counts as finished if all its tokens arrive, and its text is exactly the text
that the same server gave without the kill. vllm-router and Ray Serve use their default retries. Each round of
vllm-router starts its own engines and router; the backends of Headrace and Ray are restarted automatically.
"""

from __future__ import annotations

import asyncio
import random
import signal
import sys
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from cluster.process.ports import free_port
from loadtests import peers
from loadtests.children import Child, Children
from loadtests.faces.base import CallFailed, Request
from loadtests.faces.openai_sse import OpenAiSse
from loadtests.faults.calls import Caller, CallResult, FaultRequest, make_request
from loadtests.processes import SIMULATED
from loadtests.serving import fleet, ray_serve
from loadtests.serving.ours import MODEL

OURS, ROUTER, RAY = "ours", "vllm-router", "Ray Serve's gRPC proxy"
BACKENDS, STREAMS, ROUNDS = 2, 32, 5
STEP_MS, WORDS, TOKENS, BEGUN_PIECES = 20, 40, 100, 10
BEGUN_S, ENDS_S, BACK_S = 30.0, 120.0, 60.0


def source(model: Path, plain: str, seed: int) -> str:
    """Return the URL `sim://...` with which all backends start the same simulated engine. `plain`: further parameters
    of the URL. `seed`: seed of the tokens."""
    room = f"max_num_seqs={2 * STREAMS}&max_num_batched_tokens=4096&kv_blocks=8192&max_model_len=4096"
    return f"sim://{model}?decode_ms={STEP_MS}&prefill_tokens_per_s=100000&{room}&seed={seed}&{plain}"


@dataclass(slots=True)
class Stream:
    """Record of everything that one call received."""

    pieces: int = 0
    text: str = ""
    completion_tokens: int | None = None
    backend: str = ""
    """Backend on which the stream began, if visible."""
    resumed: bool = False
    error: str = ""


@dataclass(slots=True)
class Finished:
    """Results of one server (ours, vllm-router or Ray Serve's proxy) over all its rounds."""

    begun: int = 0
    whole: int = 0
    hit: int = 0
    """Number of streams that were resumed, or did not finish."""
    errors: dict[str, int] = field(default_factory=dict)
    calls: list[CallResult] = field(default_factory=list)
    """Calls to check against the ledger, if the arm has a ledger."""

    def settings(self) -> dict[str, Any]:
        """Return the values for the report."""
        return {"begun": self.begun, "finished whole": self.whole, "hit": self.hit, "errors": self.errors}

    def __str__(self) -> str:
        return f"{self.whole} of {self.begun} ({self.whole + self.hit - self.begun} of {self.hit} that were hit)"


Call = Callable[[FaultRequest, Stream, Callable[[], None]], Coroutine[Any, Any, None]]
"""Function that makes a call, fills the call's stream and calls back after each piece. An error of the server raises no
exception.
"""


async def play_round(
    call: Call, requests: Sequence[FaultRequest], kill: Callable[[Sequence[Stream]], None], into: Finished
) -> None:
    """Run all streams undisturbed, then again with one backend killed, and add the results to `into`. Raises
    RuntimeError if an undisturbed stream fails."""
    undisturbed = [Stream() for _ in requests]
    await asyncio.gather(
        *(call(request, stream, _ignore_piece) for request, stream in zip(requests, undisturbed, strict=True))
    )
    broken = [
        stream.error or "the answer is incomplete"
        for stream in undisturbed
        if stream.error or stream.completion_tokens != TOKENS
    ]
    if broken:
        raise RuntimeError(f"{len(broken)} streams did not finish undisturbed: {broken[0]}")
    streams, begun = [Stream() for _ in requests], asyncio.Event()

    def on_piece() -> None:
        if all(stream.pieces >= BEGUN_PIECES for stream in streams):
            begun.set()

    tasks = [
        asyncio.create_task(call(request, stream, on_piece)) for request, stream in zip(requests, streams, strict=True)
    ]
    try:
        await asyncio.wait_for(begun.wait(), BEGUN_S)
        kill(streams)
        await asyncio.wait(tasks, timeout=ENDS_S)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    for stream, before in zip(streams, undisturbed, strict=True):
        whole = not stream.error and (stream.completion_tokens, stream.text) == (TOKENS, before.text)
        into.begun += 1
        into.whole += whole
        into.hit += stream.resumed or not whole
        if not whole:
            error = stream.error[:80] or "the stream ended without an error, but is incomplete"
            into.errors[error] = into.errors.get(error, 0) + 1


def _ignore_piece() -> None:
    pass


def requests_of(seed: int, number: int) -> list[FaultRequest]:
    """Return the requests of round `number`. They depend only on `seed` and `number`."""
    rng = random.Random(f"{seed} {number}")
    return [make_request(f"p{number}-{i}", "greedy", MODEL, TOKENS, WORDS, rng.random()) for i in range(STREAMS)]


def over_grpc(caller: Caller, results: list[CallResult]) -> Call:
    """Return a function that makes calls over our gRPC API."""

    async def call(request: FaultRequest, stream: Stream, on_piece: Callable[[], None]) -> None:
        def on_chunk(result: CallResult) -> None:
            stream.pieces = len(result.chunks)
            on_piece()

        result = await caller.call(request, on_chunk)
        results.append(result)
        stream.text, stream.error, stream.backend = result.texts.get(0, ""), result.error, result.answer_id
        stream.completion_tokens = result.usage.completion_tokens if result.usage is not None else None
        stream.resumed = result.resumed > 0

    return call


def over_http(face: OpenAiSse) -> Call:
    """Return a function that makes calls over OpenAI's API."""

    async def call(request: FaultRequest, stream: Stream, on_piece: Callable[[], None]) -> None:
        def on_text(text: str) -> None:
            stream.text += text
            stream.pieces += 1
            on_piece()

        try:
            answer = await face.run(Request(request.key, request.message.messages[0].content, TOKENS), on_text)
            stream.completion_tokens = answer.completion_tokens
        except CallFailed as error:
            stream.error = str(error)

    return call


async def ours(children: Children, folder: Path, bundle: Path, engine: str, seed: int, rounds: int) -> Finished:
    """Run the rounds of requests against a Headrace gateway with two workers. In each round one random worker is
    killed. Raises DidNotStart."""
    out, rng = Finished(), random.Random(seed)
    sources = [engine] * BACKENDS
    async with fleet.running(children, folder, bundle=bundle, sources=sources, name="beside-peers") as running:
        caller = Caller(running.grpc, running.metadata, "peers")

        def kill(_: Sequence[Stream]) -> None:
            rng.choice(running.workers).signal(signal.SIGKILL)

        try:
            for number in range(rounds):
                await running.until_all_up()
                await play_round(over_grpc(caller, out.calls), requests_of(seed, number), kill, out)
        finally:
            await caller.close()
    return out


async def vllm_router(
    children: Children, environment: Path, bundle: Path, engine: str, seed: int, rounds: int
) -> Finished:
    """Run the rounds on two OpenAI servers behind vllm-router. Raises DidNotStart or NoPeers."""
    out, rng = Finished(), random.Random(seed)
    for number in range(rounds):
        async with AsyncExitStack() as stack:
            servers = []
            for _ in range(BACKENDS):
                servers.append(await stack.enter_async_context(_server(children, bundle, engine)))
            ports = [port for _, port in servers]
            peer = await peers.vllm_router(children, environment, *ports, policy="round_robin")
            stack.push_async_callback(peer.child.stop)
            face = OpenAiSse(peer.url, MODEL)
            stack.push_async_callback(face.close)

            def kill(_: Sequence[Stream], servers: Sequence[tuple[Child, int]] = servers) -> None:
                for process in rng.choice(servers)[0].commands():
                    process.send_signal(signal.SIGKILL)

            await play_round(over_http(face), requests_of(seed, number), kill, out)
    return out


@asynccontextmanager
async def _server(children: Children, bundle: Path, engine: str) -> AsyncIterator[tuple[Child, int]]:
    port = free_port()
    command = [sys.executable, "-m", "loadtests.serving.sse_engine", "--port", str(port), "--model", MODEL]
    child = children.start("sse-engine", SIMULATED, [*command, "--bundle", str(bundle), "--source", engine])
    try:
        await child.until(lambda: peers.answers(port, "/health"), "it listens", BACK_S)
        yield child, port
    finally:
        await child.stop()


async def ray_proxy(children: Children, folder: Path, bundle: Path, engine: str, seed: int, rounds: int) -> Finished:
    """Run the rounds on two replicas behind Ray Serve's proxy. Each round kills one replica, which is chosen with
    `seed`. Raises DidNotStart."""
    out = Finished()
    simulated = ["--simulated", engine, "--bundle", str(bundle), "--replicas", str(BACKENDS)]
    async with ray_serve.running(
        children, "ray-faults", folder, {}, {"RAY_USAGE_STATS_ENABLED": "0"}, direct_ingress=False, simulated=simulated
    ) as serving:
        caller = Caller(serving.address, serving.metadata, "peers")
        living: list[CallResult] = []

        def replicas() -> list[int]:
            pids = []
            for root, _ in serving.roots:
                for process in psutil.Process(root).children(recursive=True):
                    if "ServeReplica" in " ".join(process.cmdline()):
                        pids.append(process.pid)
            return pids

        def kill(streams: Sequence[Stream]) -> None:
            psutil.Process(random.Random(seed).choice(replicas())).kill()

        try:
            for number in range(rounds):
                await _replicas_serve(caller, replicas, seed, number)
                await play_round(over_grpc(caller, living), requests_of(seed, number), kill, out)
        finally:
            await caller.close()
    return out


async def _replicas_serve(caller: Caller, replicas: Callable[[], list[int]], seed: int, number: int) -> None:
    """Wait until both replicas answer. Raises TimeoutError."""
    async with asyncio.timeout(BACK_S):
        while True:
            results = await asyncio.gather(*(caller.call(request) for request in requests_of(seed, 1000 + number)[:8]))
            answering = {result.answer_id.split("-")[0] for result in results if not result.error}
            if len(answering) == BACKENDS and answering == set(map(str, replicas())):
                return
            await asyncio.sleep(0.5)
