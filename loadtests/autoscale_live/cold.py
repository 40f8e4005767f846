"""Benchmark of cold starts, from nothing to the first token.

`python -m loadtests.autoscale_live.cold [--rounds 5] [--model FOLDER] [--json FILE]`

Two cases alternate. For vLLM's own server, the time runs from exec to the first text; the call is repeated
until the server answers. For ours, the time runs from sending a call to a model at zero replicas to the
first text. Both cases use the same real engine with the same arguments. Our gateway, controller and Ray
already run, as they do when a model scales up. Our time is split into four parts: until the replica begins
(the decision, Ray Serve, Ray), until the model files are found and digested, until the engine is up
(imports, load, golden check), and until the first text.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx

from cluster.api.types import ModelSpec
from cluster.process.ports import free_port
from cluster.worker.engine.vllm.arguments import CPU_KV_CACHE_BYTES
from loadtests import machine
from loadtests.autoscale_live.calls import MODEL, prompt
from loadtests.autoscale_live.rig import Live, running_test_bed
from loadtests.autoscale_live.traffic import PlannedCall
from tests.support.checkpoints import build_checkpoint

TOKENS, START_S, LOOK_S = 8, 180.0, 0.02
DTYPE, MAX_MODEL_LEN = "float32", 2048
STARTED = "worker.engine_started"


async def vllm_alone(folder: Path, log: Path) -> float:
    """Start vLLM's own server, without Headrace, and call it. Returns the seconds from the start of its process to the
    first text. Raises RuntimeError if no text comes within the time limit."""
    port = free_port()
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder)]
    command += ["--served-model-name", MODEL, "--host", "127.0.0.1", "--port", str(port), "--enforce-eager"]
    command += ["--dtype", DTYPE, "--max-model-len", str(MAX_MODEL_LEN)]
    command += ["--kv-cache-memory-bytes", str(CPU_KV_CACHE_BYTES), "--disable-uvicorn-access-log"]
    variables = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    with log.open("ab") as output:
        began = time.monotonic()
        server = await asyncio.create_subprocess_exec(
            *command, stdout=output, stderr=output, env={**os.environ, **variables}, start_new_session=True
        )
    try:
        return await _first_text(f"http://127.0.0.1:{port}/v1/chat/completions", began)
    finally:
        server.terminate()
        await server.wait()


async def _first_text(url: str, began: float) -> float:
    body = {
        "model": MODEL,
        "messages": [{"role": "user", "content": prompt(0)}],
        "max_tokens": TOKENS,
        "temperature": 0.0,
        "ignore_eos": True,
        "stream": True,
    }
    async with httpx.AsyncClient(timeout=START_S, trust_env=False) as client:
        while time.monotonic() - began < START_S:
            try:
                async with client.stream("POST", url, json=body) as reply:
                    async for line in reply.aiter_lines():
                        if line.startswith("data: {") and json.loads(line[6:])["choices"][0]["delta"].get("content"):
                            return time.monotonic() - began
            except httpx.TransportError:
                await asyncio.sleep(LOOK_S)
    raise RuntimeError("vLLM's server did not answer in time")


async def from_zero(live: Live) -> dict[str, float]:
    """Call a model at zero replicas; return the total seconds and the seconds of each part. Raises RuntimeError if the
    call fails.
    """
    before = len(_started(live))
    sent = time.time()
    result = await live.callers.call(PlannedCall(0.0, TOKENS, 0, 0))
    if result.fault or result.first_s is None:
        raise RuntimeError(f"the call to a model at zero replicas failed: {result.fault}")
    rows = _started(live)[before:]
    live.desk.scale(MODEL, 0)
    await live.until_at_zero()
    live.desk.scale(MODEL, None)
    parts = {"all": result.first_s}
    if rows:
        began, engine_s, opened_s = rows[-1]
        placed_s = began - sent
        rest_s = result.first_s - placed_s - opened_s - engine_s
        parts |= {"until the replica begins": placed_s, "files": opened_s, "engine": engine_s, "first text": rest_s}
    return {name: round(value, 3) for name, value in parts.items()}


def _started(live: Live) -> Sequence[tuple[float, float, float]]:
    """Return a tuple (began, engine_s, opened_s) for each replica that has started, sorted by time. `began`: Unix time
    at which the replica's start began. `opened_s`: seconds from then until its model was opened. `engine_s`: further
    seconds until its engine was up. The values are read from Ray's logs."""
    starts: set[tuple[float, float, float]] = set()
    for path in (live.ray.folder / "session_latest" / "logs").glob("worker-*.*"):
        starts |= set(starts_in(path.read_text(errors="replace")))
    return sorted(starts)


def starts_in(output: str) -> Iterator[tuple[float, float, float]]:
    """Yield (began, engine_s, opened_s) of each event STARTED in the output of replicas, whose events are lines of
    JSON."""
    for line in output.splitlines():
        if STARTED in line and line.startswith("{"):
            event = json.loads(line)
            if event["event"] == STARTED:
                yield event["began"], event["engine_s"], event["opened_s"]


async def run(rounds: int, model: str, folder: Path) -> dict[str, Any]:
    """Run all rounds, after one warm-up of each case. The warm-ups are not counted."""
    checkpoint = Path(model) if model else build_checkpoint("llama", folder / "llama")
    spec = ModelSpec(
        MODEL,
        str(checkpoint),
        min_replicas=0,
        max_replicas=1,
        idle_s=600.0,
        dtype=DTYPE,
        max_model_len=MAX_MODEL_LEN,
    )
    alone: list[float] = []
    ours: list[dict[str, float]] = []
    async with running_test_bed(folder, checkpoint, spec) as live:
        await live.until_at_zero()
        for number in range(rounds + 1):
            theirs_s = await vllm_alone(checkpoint, folder / "vllm.log")
            parts = await from_zero(live)
            print(f"round {number}: vLLM alone {theirs_s:.2f} s, ours {parts}", flush=True)
            if number:
                alone.append(theirs_s)
                ours.append(parts)
    ratios = [parts_of_start["all"] / theirs for parts_of_start, theirs in zip(ours, alone, strict=True)]
    return {
        "machine": machine.hardware(),
        "model": model or "a tiny LLaMA",
        "vllm_alone_s": alone,
        "ours_s": ours,
        "ratios": ratios,
        "ratio_of_medians": statistics.median(parts_of_start["all"] for parts_of_start in ours)
        / statistics.median(alone),
        "worst_ratio": max(ratios),
    }


def main() -> int:
    """Run all rounds and report the figures."""
    parser = argparse.ArgumentParser(prog="python -m loadtests.autoscale_live.cold")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--model", default="", help="a checkpoint (default: a tiny random LLaMA)")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        figures = asyncio.run(run(given.rounds, given.model, Path(folder)))
    text = json.dumps(figures, indent=1)
    if given.json is not None:
        given.json.write_text(text)
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
