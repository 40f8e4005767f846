"""Program that runs a plain vLLM deployment on a running Ray, behind Ray Serve's own gRPC proxy or direct ingress.

python -m loadtests.serving.ray_app --folder MODEL --engine JSON --grpc-port PORT --ready FILE

The deployment is what a user of Ray Serve would write: AsyncLLM in a deployment whose method is a generator of
messages. The messages are ours (cluster.v1), so that one driver serves both sides. The program joins the Ray of
RAY_ADDRESS and ends on SIGTERM.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import threading
import uuid
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import ray
from ray import serve
from ray.serve.config import HTTPOptions, gRPCOptions

from cluster.v1 import inference_pb2 as pb
from loadtests.serving.ray_serve import APPLICATION

SERVICER = "cluster.v1.inference_pb2_grpc.add_InferenceServicer_to_server"


class Plain:
    """Deployment with one vLLM engine and one method."""

    def __init__(self, folder: str, engine: dict[str, Any]) -> None:
        from vllm import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        self._llm = AsyncLLM.from_engine_args(AsyncEngineArgs(model=folder, **engine))
        self._tokenizer: Any = None

    async def StreamChat(self, request: pb.ChatRequest) -> AsyncIterator[pb.ChatChunk]:
        """Yield a chunk for each output of the engine. The last chunk has the usage."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        if self._tokenizer is None:
            from transformers import AutoTokenizer

            self._tokenizer = AutoTokenizer.from_pretrained(self._llm.model_config.model)
        messages = [{"role": message.role, "content": message.content} for message in request.messages]
        text = self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        ids = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        sampling = SamplingParams(
            max_tokens=request.max_tokens,
            temperature=request.temperature,
            ignore_eos=request.ignore_eos,
            output_kind=RequestOutputKind.DELTA,
        )
        call, tokens = uuid.uuid4().hex, 0
        async for output in self._llm.generate({"prompt_token_ids": ids}, sampling, call):
            (out,) = output.outputs
            tokens += len(out.token_ids)
            delta = pb.ChoiceDelta(index=0, delta=pb.Message(content=out.text), finish_reason=out.finish_reason or "")
            chunk = pb.ChatChunk(id=call, model=request.model, choices=[delta])
            if output.finished:
                chunk.usage.CopyFrom(pb.Usage(prompt_tokens=len(ids), completion_tokens=tokens))
            yield chunk


class Simulated:
    """Deployment with the simulated engine in place of vLLM. The id of an answer begins with the pid of the replica."""

    def __init__(self, source: str, bundle: str) -> None:
        from cluster.gateway.text.tokenizer import TextModel
        from cluster.wire.bundle import Bundle
        from cluster.worker.engine.simulated.engine import SimConfig, SimEngine

        self._engine = SimEngine(SimConfig.from_source(source))
        self._text = TextModel.from_bundle(Bundle.load(Path(bundle)))
        self._stepping: asyncio.Task[None] | None = None
        self._outputs: dict[str, asyncio.Queue[Any]] = {}

    async def _run(self) -> None:
        await self._engine.start()
        self._started.set()
        while True:
            for output in await self._engine.step():
                self._outputs[output.request_id].put_nowait(output)

    async def StreamChat(self, request: pb.ChatRequest) -> AsyncIterator[pb.ChatChunk]:
        """Yield a chunk for each output of the engine. The last chunk has the usage."""
        from cluster.api.types import EngineRequest, Sampling

        if self._stepping is None:
            self._started = asyncio.Event()
            self._stepping = asyncio.create_task(self._run())
        await self._started.wait()
        ids = self._text.codec.encode_chat([{"role": m.role, "content": m.content} for m in request.messages])
        call, tokens = f"{os.getpid()}-{uuid.uuid4().hex}", 0
        outputs = self._outputs[call] = asyncio.Queue()
        sampling = Sampling(
            max_tokens=request.max_tokens, temperature=request.temperature, ignore_eos=request.ignore_eos
        )
        detokenizer, finished = self._text.detokenizer(ids), False
        await self._engine.submit(EngineRequest(call, ids, sampling))
        try:
            while not finished:
                output = await outputs.get()
                detokenizer.push(output.token_ids)
                tokens += len(output.token_ids)
                finished = output.finish is not None
                text = detokenizer.pop_text(finished)
                delta = pb.ChoiceDelta(
                    index=0, delta=pb.Message(content=text), finish_reason="length" if finished else ""
                )
                chunk = pb.ChatChunk(id=call, model=request.model, choices=[delta], offset=tokens)
                if finished:
                    chunk.usage.CopyFrom(pb.Usage(prompt_tokens=len(ids), completion_tokens=tokens))
                yield chunk
        finally:
            await self._engine.abort([call])
            del self._outputs[call]


def main() -> None:
    """Deploy the application, write the ready file, and wait for SIGTERM."""
    parser = argparse.ArgumentParser()
    for name in ("folder", "engine", "ready"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--grpc-port", type=int, required=True)
    parser.add_argument("--http-port", type=int, required=True)
    parser.add_argument("--gpus", type=int, default=0)
    parser.add_argument("--simulated", default="", help="a simulated engine's source")
    parser.add_argument("--bundle", default="", help="its tokenizer")
    parser.add_argument("--replicas", type=int, default=1)
    arguments = parser.parse_args()
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    here = str(Path(__file__).resolve().parent.parent.parent)
    environment = {"PYTHONPATH": here, **json.loads(os.environ.get("LOADTEST_ENGINE_ENVIRONMENT", "{}"))}
    ray.init(log_to_driver=False, runtime_env={"env_vars": environment})
    serve.start(
        http_options=HTTPOptions(host="127.0.0.1", port=arguments.http_port),
        grpc_options=gRPCOptions(port=arguments.grpc_port, grpc_servicer_functions=[SERVICER]),
    )
    resources = {"num_cpus": 1, "num_gpus": arguments.gpus}
    options = {"max_ongoing_requests": 1000, "ray_actor_options": resources, "num_replicas": arguments.replicas}
    if arguments.simulated:
        bound = serve.deployment(Simulated, name="plain", **options).bind(arguments.simulated, arguments.bundle)
    else:
        bound = serve.deployment(Plain, name="plain", **options).bind(arguments.folder, json.loads(arguments.engine))
    serve.run(bound, name=APPLICATION, route_prefix="/")
    Path(arguments.ready).write_text("{}")
    stop.wait()
    serve.shutdown()
    ray.shutdown()


if __name__ == "__main__":
    main()
