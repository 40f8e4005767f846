"""Part `embeddings` of the load test: the cost of a vector, compared with vLLM's own server on the same model.

vLLM's server and Headrace get requests for vectors from 64 concurrent callers over OpenAI's API, one text per request.
Headrace is also measured over gRPC. The part measures the CPU time of all processes except the engine core, the vectors
per second, and the largest difference between a vector and the vector that transformers computes for the same text. The
model is all-MiniLM-L6-v2 in float32.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from loadtests import peers
from loadtests.agents.servers import ENVIRONMENT
from loadtests.agents.tool_tokens import bind
from loadtests.datasets import prose
from loadtests.driver import Limits
from loadtests.faces.base import Request
from loadtests.faces.embeddings import GrpcEmbeddings, HttpEmbeddings
from loadtests.figures import Bound, Figure, missing, ratio_figure
from loadtests.report import Round
from loadtests.scenarios.common import Contestant, Stage, alternate, first_call, per_round, rounds_of
from loadtests.scenarios.parts import exact
from loadtests.serving import ours as serving

CALLERS, CALLS, TEXT_CHARS, COMPARED = 64, 512, 90, 64
ENGINE: Mapping[str, object] = {
    "runner": "pooling",
    "dtype": "float32",
    "max_num_seqs": 128,
    "kv_cache_memory_bytes": 64 << 20,
}
CPU, RATE = (
    "front-end CPU an embedding, 64 callers, against vLLM's server",
    "embeddings a second, against vLLM's server",
)
GRPC = ", by Embed"
DIFFERENCE = "largest difference of a vector from transformers' (of 64 texts)"
CPU_BOUND, RATE_BOUND = Bound("<=", 0.5), Bound(">=", 1.0)
DIFFERENCE_BOUND = Bound("<=", 1e-5)
ROWS: Mapping[str, Bound | None] = {
    CPU: CPU_BOUND, CPU + GRPC: CPU_BOUND, RATE: RATE_BOUND, RATE + GRPC: RATE_BOUND, DIFFERENCE: DIFFERENCE_BOUND,
}  # fmt: skip
LIMITS = Limits(call_s=60.0, run_s=180.0)


def requests(round_: int) -> list[Request]:
    """Return the calls of a round. Each call has one text of about 20 tokens."""
    keys = [f"{round_}/{number}" for number in range(CALLS)]
    return [Request(key, prose(f"embed/{key}", TEXT_CHARS), 1) for key in keys]


async def reference(stage: Stage, model: Path, texts: Sequence[str]) -> np.ndarray:
    """Return the vectors that transformers computes for some texts. Raises DidNotStart."""
    given, out = stage.folder / "texts.json", stage.folder / "vectors.npy"
    given.write_text(json.dumps(list(texts)))
    command = [sys.executable, "-m", "loadtests.adapters.reference", str(model), str(given), str(out)]
    child = stage.children.start("reference-vectors", "preparation", command)

    async def written() -> bool:
        return await asyncio.to_thread(out.exists)

    await child.until(written, "transformers' vectors are written", serving.PREPARE_S)
    await child.stop()
    return np.asarray(np.load(out))


async def measure(stage: Stage) -> list[Figure]:
    """Measure the servers in turn and return the report's rows. Raises DidNotStart."""
    model, bundle = await serving.prepare(stage.children, "minilm", stage.folder)
    texts = [request.prompt for request in requests(0)[:COMPARED]]
    expected = await reference(stage, model, texts)
    environment = {**ENVIRONMENT, "OMP_NUM_THREADS": "1"}
    server, _ = await peers.vllm_server(stage.children, serving.MODEL, model, ENGINE, environment)
    ours = await serving.start(
        stage.children, stage.folder, bundle=bundle, source=str(model), engine=ENGINE, environment=environment
    )  # fmt: skip
    http = HttpEmbeddings(ours.http, ours.model, api_key=ours.key)
    arms = [
        Contestant(stage.arm("vLLM server", "/v1/embeddings of vLLM's own server"),
                   HttpEmbeddings(server.url, serving.MODEL), [(server.child.pid, server.child.kind)]),
        Contestant(stage.arm("ours HTTP", "/v1/embeddings of the gateway, with its worker"), http, ours.roots),
        Contestant(stage.arm("ours gRPC", "Embed of the gateway, with its worker"),
                   GrpcEmbeddings(ours.grpc, ours.model, ours.metadata), ours.roots),
    ]  # fmt: skip
    callers, rounds = stage.options.concurrency or CALLERS, rounds_of(stage.options)
    stage.report.settings["embeddings"] = {"callers": callers, "calls": CALLS, "cores": bind(stage, arms)}
    try:
        ready = [arm for arm in arms if await first_call(arm, requests(0)[0])]
        difference = float(np.abs(np.asarray(await http.vectors(texts)) - expected).max())
        await alternate(stage, ready, requests, rounds=rounds, concurrency=callers, limits=LIMITS)
    finally:
        for arm in arms:
            await arm.face.close()
    return [*figures(*arms), exact(DIFFERENCE, difference, DIFFERENCE_BOUND)]


def front_end_s(round_: Round) -> float | None:
    """Return the CPU seconds of the front end per embedding."""
    return round_.usage.front_end_s() / round_.run.tokens if round_.run.tokens else None


def rate(round_: Round) -> float | None:
    """Return the embeddings a second."""
    ended = [record.ended_s for record in round_.run.good]
    return len(ended) / max(ended) if ended else None


def figures(theirs: Contestant, *ours: Contestant) -> list[Figure]:
    """Return the report's rows: cost and rate, each for HTTP and for gRPC. `theirs`: vLLM's server. `ours`: Headrace
    over HTTP, then over gRPC."""
    rows: dict[str, Figure] = {}
    for arm, suffix in zip(ours, ("", GRPC), strict=True):
        for name, value, bound, scale, unit in (
            (CPU, front_end_s, CPU_BOUND, 1e6, "µs/embedding"), (RATE, rate, RATE_BOUND, 1.0, "embeddings/s"),
        ):  # fmt: skip
            problem = arm.arm.problem or theirs.arm.problem
            rows[name + suffix] = (
                missing(name + suffix, bound, problem)
                if problem
                else ratio_figure(
                    name + suffix, *per_round(arm, theirs, value), bound, scale=scale, difference_unit=unit
                )
            )
    return [rows[name] for name in (CPU, CPU + GRPC, RATE, RATE + GRPC)]
