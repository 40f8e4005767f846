"""Hostile calls of every kind over all APIs while another tenant streams. Measured: whether a worker's link or a stream
is affected.

The calls come from a seeded generator (generator.py). They are made over gRPC as single calls and in sessions, and over
HTTP. On simulated engines half of the calls arrive while there is capacity. The other half arrive while all capacity is
in use: they wait, and are sent later by the code that reads a link's messages. On the real engine all calls arrive
while there is capacity. A stream of the other tenant is affected if it fails, if its text differs from the undisturbed
text, or if it was resumed on another worker.
"""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import sys
from collections import Counter
from collections.abc import AsyncIterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import grpc
import grpc.aio
from google.protobuf.message import DecodeError

from cluster.v1 import inference_pb2 as pb
from cluster.v1 import inference_pb2_grpc as pb_grpc
from loadtests.faults.engines import ENGINE, ENVIRONMENT
from loadtests.figures import Bound, Figure
from loadtests.hostile.generator import Generator, Hostile, length_delimited
from loadtests.scenarios.common import Stage
from loadtests.scenarios.parts import exact
from loadtests.serving import fleet, ours
from loadtests.serving.fleet import Fleet

LINKS = "links lost by 10,000 hostile calls, queued and unqueued"
STREAMS = "other tenants' streams that they touched"
ENGINE_LINKS = "links lost by 1,000 of them on the real engine"
ENGINE_STREAMS = "other tenants' streams that these touched"
_NONE = Bound("<=", 0.0)
ROWS: Mapping[str, Bound] = {LINKS: _NONE, STREAMS: _NONE, ENGINE_LINKS: _NONE, ENGINE_STREAMS: _NONE}
CALLS, ENGINE_CALLS = 10_000, 1_000
WORKERS, PLACES, BYSTANDERS = 2, 16, 6
TOKENS, ENGINE_TOKENS = 160, 64
AT_ONCE, QUEUED_AT_ONCE, TOGETHER = 8, 96, 32
"""Numbers of concurrent hostile calls: while there is capacity, while there is no capacity, and in one session."""
CALL_S, STREAM_S = 10.0, 120.0
ATTACKER = "batch"
HEAD: Final = "POST {path} HTTP/1.1\r\nhost: a\r\nauthorization: Bearer {key}\r\ncontent-type: application/json\r\n"


@dataclass(slots=True)
class AttackResults:
    """Results of the hostile calls, and of the other tenant's streams meanwhile."""

    answers: Counter[str] = field(default_factory=Counter)
    touched: list[str] = field(default_factory=list)
    streams: int = 0

    def note(self, downs: int) -> str:
        """Return the note for the report. `downs`: number of links that the gateway has lost."""
        kinds = ", ".join(f"{count} {name}" for name, count in self.answers.most_common(8))
        return f"{sum(self.answers.values())} answers ({kinds}); {self.streams} streams; {downs} links lost"


@dataclass(frozen=True, slots=True)
class Volley:
    """A number of hostile calls from one seed, with a limit on concurrency."""

    seed: int
    calls: int
    at_once: int


class Attack:
    """Client that sends hostile calls, all with the API key of one tenant."""

    def __init__(self, address: str, http: str, key: str) -> None:
        self._key = key
        self._metadata = ours.authorization(key)
        self._http = http
        self._channel = grpc.aio.insecure_channel(address)
        self.answers: Counter[str] = Counter()

    async def close(self) -> None:
        """Close the client's connection."""
        await self._channel.close()

    async def run(self, volley: Volley) -> None:
        """Make all calls of the volley, a third of the calls over each API."""
        gate = asyncio.Semaphore(volley.at_once)
        calls = list(Generator(volley.seed, ours.MODEL).generate(volley.calls))

        async def gated(work: Any) -> None:
            async with gate:
                await work

        single, http, sessions = calls[::3], calls[1::3], calls[2::3]
        work = [self._single(call) for call in single] + [self._post(call) for call in http]
        work += [self._session(sessions[at : at + TOGETHER]) for at in range(0, len(sessions), TOGETHER)]
        await asyncio.gather(*(gated(call) for call in work))

    async def _single(self, hostile: Hostile) -> None:
        method = "Chat" if hostile.chat else "Complete"
        call: Any = self._channel.unary_unary(f"/cluster.v1.Inference/{method}")
        try:
            await call(hostile.message, metadata=self._metadata, timeout=CALL_S)
            self.answers["OK"] += 1
        except grpc.aio.AioRpcError as error:
            self.answers[error.code().name] += 1

    async def _session(self, calls: Sequence[Hostile]) -> None:
        """Make calls in one session. Calls whose bytes are no valid protobuf message are left out, because they would
        end the session."""
        calls = [call for call in calls if _is_message(call)]
        session: Any = self._channel.stream_stream("/cluster.v1.Inference/Session")(
            metadata=self._metadata, timeout=CALL_S
        )
        try:
            for number, call in enumerate(calls, 1):
                start = pb.SessionStart(call_id=number, deadline_ms=int(1000 * CALL_S / 2)).SerializeToString()
                start += length_delimited(2 if call.chat else 3, call.message)
                await session.write(length_delimited(1, start))
            await session.done_writing()
            while (message := await session.read()) is not grpc.aio.EOF:
                self._count(pb.SessionEvents.FromString(message))
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError, grpc.aio.InternalError) as error:
            self.answers[f"session {type(error).__name__}"] += 1  # the last: it ended before done_writing

    def _count(self, message: pb.SessionEvents) -> None:
        for event in message.events:
            if event.status:
                self.answers["refused in a session"] += 1
            elif event.chat.HasField("usage") or event.complete.HasField("usage"):
                self.answers["OK in a session"] += 1

    async def _post(self, call: Hostile) -> None:
        path = "/v1/chat/completions" if call.chat else "/v1/completions"
        host, _, port = self._http.rpartition(":")
        try:
            async with asyncio.timeout(CALL_S):
                reader, writer = await asyncio.open_connection(host, int(port))
                try:
                    head = HEAD.format(path=path, key=self._key) + f"content-length: {len(call.body)}\r\n"
                    writer.write(f"{head}connection: close\r\n\r\n".encode() + call.body)
                    status = (await reader.readline()).split()
                    await reader.read()
                finally:
                    writer.close()
            self.answers[f"HTTP {status[1].decode()}" if len(status) > 1 else "HTTP cut"] += 1
        except (TimeoutError, OSError) as error:
            self.answers[f"HTTP {type(error).__name__}"] += 1


def attack(address: str, http: str, key: str, volley: Volley) -> Counter[str]:
    """Make the hostile calls of `volley`. Returns the number of answers of each kind. This function is run in a
    separate process, so that making the calls delays nothing else."""

    async def run() -> Counter[str]:
        attacker = Attack(address, http, key)
        try:
            await attacker.run(volley)
        finally:
            await attacker.close()
        return attacker.answers

    return asyncio.run(run())


async def attacked(running: Fleet, results: AttackResults, volley: Volley) -> None:
    """Run a volley to the end and add the answers to the results."""
    arguments = (running.grpc, running.endpoints["http"], running.keys[ATTACKER], volley)
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        results.answers += await asyncio.get_running_loop().run_in_executor(pool, attack, *arguments)


def _is_message(call: Hostile) -> bool:
    try:
        (pb.ChatRequest if call.chat else pb.CompleteRequest).FromString(call.message)
    except DecodeError:
        return False
    return True


class Bystanders:
    """Streams of a tenant that does not take part in the attack, compared with undisturbed streams. Each of BYSTANDERS
    tasks makes one stream after the other."""

    def __init__(self, running: Fleet, results: AttackResults, tokens: int) -> None:
        self._running = running
        self._results = results
        self._requests = [
            pb.CompleteRequest(
                model=running.model, prompt=f"Bystander {number} tells", max_tokens=tokens, temperature=0.0,
                ignore_eos=True,
            )
            for number in range(BYSTANDERS)
        ]  # fmt: skip
        self._alone: list[str] = []

    async def _stream(self, stub: Any, request: pb.CompleteRequest) -> tuple[str, int]:
        text, resumed = "", 0
        async for chunk in stub.StreamComplete(request, metadata=self._running.metadata, timeout=STREAM_S):
            text += "".join(choice.text for choice in chunk.choices)
            resumed = max(resumed, chunk.usage.resumed)
        return text, resumed

    async def _stream_repeatedly(self, stub: Any, number: int) -> None:
        while True:
            try:
                text, resumed = await self._stream(stub, self._requests[number])
            except grpc.aio.AioRpcError as error:
                self._results.touched.append(f"{error.code().name}: {error.details()}")
                continue
            self._results.streams += 1
            if text != self._alone[number] or resumed:
                self._results.touched.append(f"lane {number}: {'resumed' if resumed else 'another text'}")

    @asynccontextmanager
    async def streaming(self) -> AsyncIterator[None]:
        """Make streams while the context is entered."""
        async with grpc.aio.insecure_channel(self._running.grpc) as channel:
            stub = pb_grpc.InferenceStub(channel)
            if not self._alone:
                self._alone = [(await self._stream(stub, request))[0] for request in self._requests]
            tasks = [asyncio.create_task(self._stream_repeatedly(stub, number)) for number in range(BYSTANDERS)]
            try:
                yield
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)


def downs(running: Fleet) -> int:
    """Return the number of links that the gateway has lost so far."""
    return sum(event.name == "worker.disconnected" for event in running.link_log.events)


@asynccontextmanager
async def occupied_capacity(running: Fleet) -> AsyncIterator[None]:
    """Occupy all free capacity with long calls of the attacker, so that the attacker's other calls wait."""
    metadata = running.metadata_of(ATTACKER)
    long = pb.CompleteRequest(model=running.model, prompt="x", max_tokens=1500, temperature=0.0, ignore_eos=True)
    async with grpc.aio.insecure_channel(running.grpc) as channel:
        stub: Any = pb_grpc.InferenceStub(channel)

        async def hold() -> None:
            while True:
                await stub.Complete(long, metadata=metadata)

        holds = [asyncio.create_task(hold()) for _ in range(WORKERS * PLACES)]
        try:
            yield
        finally:
            for task in holds:
                task.cancel()
            await asyncio.gather(*holds, return_exceptions=True)


@asynccontextmanager
async def serving(stage: Stage, name: str, bundle: Path, source: str, workers: int) -> AsyncIterator[Fleet]:
    """Start a gateway and workers that dial the gateway directly. There is no relay in between, because all workers
    would share it and a delay of one worker would delay all."""
    home = stage.folder / name
    async with AsyncExitStack() as stack:
        running = await fleet.started_gateway(stack, stage.children, home, classes=(ATTACKER,))
        command = [sys.executable, "-m", "loadtests.serving.worker", "--name", ours.MODEL, "--bundle", str(bundle)]
        command += ["--source", source, "--engine", json.dumps(dict(ENGINE)), "--link", running.endpoints["link"]]
        for number in range(workers):
            own = ["--id", f"w{number}", "--ready", str(home / f"{number}.ready")]
            child = stage.children.start(f"{name}-{number}", ours.WORKER, [*command, *own], ENVIRONMENT)
            stack.push_async_callback(child.stop)

        async def linked() -> bool:
            return len(running.link_log.up) == workers

        await running.gateway.until(linked, "every worker has its link", ours.ENGINE_READY_S)
        yield running


async def simulated(stage: Stage, calls: int) -> tuple[AttackResults, int]:
    """Attack simulated engines with `calls` calls, half of which are queued. Return the results and the number of links
    that the gateway has lost."""
    model, bundle = await ours.prepare(stage.children, "tokenizer", stage.folder)
    room = f"max_num_seqs={PLACES}&max_num_batched_tokens=2048&kv_blocks=8192&max_model_len=4096"
    source = f"sim://{model}?decode_ms=10&prefill_tokens_per_s=40000&{room}&{ours.plain_tokens(model)}"
    results, seed = AttackResults(), stage.options.seed
    async with serving(stage, "links", bundle, source, WORKERS) as running:
        async with Bystanders(running, results, TOKENS).streaming():
            await attacked(running, results, Volley(seed, calls // 2, AT_ONCE))
            async with occupied_capacity(running):
                await attacked(running, results, Volley(seed + 1, calls - calls // 2, QUEUED_AT_ONCE))
        return results, downs(running)


async def real(stage: Stage, calls: int) -> tuple[AttackResults, int]:
    """Send `calls` hostile calls to one worker with a real vLLM engine. Returns the results, and how often the gateway
    lost the worker."""
    model, bundle = await ours.prepare(stage.children, "llama", stage.folder)
    results = AttackResults()
    async with serving(stage, "links-engine", bundle, str(model), 1) as running:
        async with Bystanders(running, results, ENGINE_TOKENS).streaming():
            await attacked(running, results, Volley(stage.options.seed + 2, calls, AT_ONCE))
        return results, downs(running)


async def measure(stage: Stage) -> list[Figure]:
    """Attack simulated engines, then the real engine; return the report's rows."""
    figures = []
    for part, calls, links, streams in (
        (simulated, CALLS, LINKS, STREAMS),
        (real, ENGINE_CALLS, ENGINE_LINKS, ENGINE_STREAMS),
    ):
        results, lost = await part(stage, calls)
        stage.report.problems += [f"links: {what}" for what in results.touched[:5]]
        figures.append(exact(links, lost, _NONE, "links", results.note(lost)))
        figures.append(exact(streams, len(results.touched), _NONE, "streams", f"of {results.streams}"))
    return figures
