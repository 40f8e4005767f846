"""Program that runs vLLM's own OpenAI server on scripted tokens, one server for each model.

python -m loadtests.agents.vllm_server FILE

FILE is JSON: `models` (objects with `name`, `folder`, `scripts`, `tools`, `reasoning`, `port`), `prompts` (a PromptLog)
and `ready` (a file that is written when every server listens). Everything except the engine core is vLLM's: the app,
its renderer, parsers, input processor and detokenizer.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import socket
import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import uvicorn
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.entrypoints.launchers.api_server.app_state import init_app_state
from vllm.entrypoints.launchers.app import build_app
from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
from vllm.renderers import renderer_from_config
from vllm.usage.usage_lib import UsageContext
from vllm.utils.argparse_utils import FlexibleArgumentParser
from vllm.v1.engine import EngineCoreOutput, FinishReason
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.input_processor import InputProcessor
from vllm.v1.engine.output_processor import OutputProcessor

from loadtests.agents.scripted import PromptLog, Scripts, steps

TASKS = ("generate",)
HOST = "127.0.0.1"


class ScriptedLLM(AsyncLLM):  # type: ignore[misc]
    """vLLM's AsyncLLM without an engine core: `generate` emits the script of the prompt.

    A request without a seed gets one token a step. A request with a seed gets steps of random sizes drawn from that
    seed, as with speculative decoding.
    """

    def __init__(self, config: Any, scripts: Scripts, prompts: PromptLog) -> None:
        """Create the front end of AsyncLLM for a VllmConfig."""
        self.vllm_config, self.model_config = config, config.model_config
        self.scheduler_config, self.observability_config = config.scheduler_config, config.observability_config
        self.renderer = renderer_from_config(config)
        self.input_processor = InputProcessor(config, self.renderer)
        self.output_processor = OutputProcessor(self.renderer.tokenizer, log_stats=False, stream_interval=1)
        self.admission_stats = self.logger_manager = self.output_handler = self.profiler = None
        self.log_requests = self.log_stats = False
        self._scripts, self._prompts = scripts, prompts

    async def get_supported_tasks(self) -> tuple[str, ...]:
        """Return the task of a language model."""
        return TASKS

    async def generate(self, prompt: Any, sampling_params: Any, request_id: str, **more: Any) -> AsyncIterator[Any]:
        """Yield vLLM's RequestOutputs of the script."""
        request = self.input_processor.process_inputs(request_id, prompt, sampling_params, supported_tasks=TASKS)
        self.input_processor.assign_request_id(request)
        params, ids = request.params, request.prompt_token_ids
        key = self._scripts.key(ids)
        self._prompts.add(key, ids)
        answer = self._scripts.answers[key]
        finish = FinishReason.STOP if len(answer) <= params.max_tokens else FinishReason.LENGTH
        largest = 1 if params.seed is None else 5
        slices = list(steps(answer[: params.max_tokens], f"vllm-{params.seed}-{key}", largest))
        self.output_processor.add_request(request, more.get("prompt_text"), None, 0, None)
        for number, token_ids in enumerate(slices, 1):
            output = EngineCoreOutput(
                request.request_id, list(token_ids), finish_reason=finish if number == len(slices) else None
            )
            made = self.output_processor.process_outputs([output])
            for request_output in made.request_outputs:
                yield request_output
            if made.reqs_to_abort:
                return
            await asyncio.sleep(0)

    async def abort(self, request_id: Any, internal: bool = False) -> None:
        """Forget requests."""
        ids = [request_id] if isinstance(request_id, str) else list(request_id)
        self.output_processor.abort_requests(ids, internal)

    async def do_log_stats(self) -> None:
        """Do nothing."""

    async def check_health(self) -> None:
        """Do nothing."""

    is_running = True
    is_stopped = False
    errored = False
    dead_error = RuntimeError("the scripted engine has no end")

    def shutdown(self, timeout: float | None = None) -> None:
        """End the renderer."""
        if (renderer := getattr(self, "renderer", None)) is not None:
            renderer.shutdown()


class _Server(uvicorn.Server):
    """A uvicorn server that leaves signals to the program, which runs several servers."""

    def capture_signals(self) -> Any:
        """Do nothing."""
        return contextlib.nullcontext()


def arguments_of(model: Mapping[str, Any]) -> Any:
    """Return the parsed command line of vLLM's server for a model."""
    words = ["--model", model["folder"], "--served-model-name", model["name"], "--dtype", "float32"]
    words += ["--max-model-len", "32768", "--enforce-eager", "--disable-log-stats", "--generation-config", "vllm"]
    words += ["--enable-auto-tool-choice", "--tool-call-parser", model["tools"]]
    words += ["--reasoning-parser", model["reasoning"]] if model["reasoning"] else []
    arguments = make_arg_parser(FlexibleArgumentParser()).parse_args(words)
    validate_parsed_serve_args(arguments)
    return arguments


async def app_of(model: Mapping[str, Any], prompts: PromptLog) -> tuple[Any, ScriptedLLM]:
    """Return vLLM's app for a model, and the app's engine client, which answers from the model's scripts."""
    arguments = arguments_of(model)
    config = AsyncEngineArgs.from_cli_args(arguments).create_engine_config(UsageContext.OPENAI_API_SERVER)
    engine = ScriptedLLM(config, Scripts.read(Path(model["folder"]), Path(model["scripts"])), prompts)
    app = build_app(arguments, TASKS, config.model_config)
    await init_app_state(engine, app.state, arguments, TASKS)
    return app, engine


@contextlib.asynccontextmanager
async def running(models: Sequence[Mapping[str, Any]], prompts: PromptLog) -> AsyncIterator[None]:
    """Run the servers of all models in this event loop."""
    servers = []
    for model in models:
        app, engine = await app_of(model, prompts)
        server = _Server(uvicorn.Config(app, log_level="warning", access_log=False))
        app.state.server = server
        listener = socket.create_server((HOST, model["port"]))
        servers.append((server, engine, asyncio.create_task(server.serve(sockets=[listener]))))
    try:
        yield
    finally:
        for server, engine, task in servers:
            server.should_exit = True
            await task
            engine.shutdown()


async def serve(given: Mapping[str, Any]) -> None:
    """Run the servers that the parsed JSON file `given` describes, until SIGTERM or SIGINT."""
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    async with running(given["models"], PromptLog(Path(given["prompts"]))):
        Path(given["ready"]).write_text("")
        await stop.wait()


if __name__ == "__main__":
    asyncio.run(serve(json.loads(Path(sys.argv[1]).read_text())))
