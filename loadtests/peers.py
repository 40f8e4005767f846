"""Functions that start the peers: vllm-router, SMG, LiteLLM and vLLM's own server, with which Headrace is compared. The
peers have their own Python environment (`make bench-peers`)."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from getpass import getuser
from pathlib import Path
from tempfile import gettempdir

from cluster.process.ports import free_port
from loadtests.children import Child, Children

ROUTER = "vllm-router"
READY_S = 120.0
ENGINE_READY_S = 540.0


class NoPeers(Exception):
    """Raised when the peers' environment is missing."""


@dataclass(frozen=True, slots=True)
class Peer:
    """A running peer: its process and its URL."""

    child: Child
    url: str


def program(environment: Path, name: str) -> str:
    """Return the path of a peer's command. Raises NoPeers."""
    path = environment / "bin" / name
    if not path.exists():
        raise NoPeers(f"{path} is missing: `make bench-peers` makes the peers' environment")
    return str(path)


async def answers(port: int, path: str) -> bool:
    """Return whether a GET on loopback gets status 200."""
    try:
        async with asyncio.timeout(2.0):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            try:
                writer.write(f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nConnection: close\r\n\r\n".encode())
                line = await reader.readline()
            finally:
                writer.close()
    except (OSError, TimeoutError):
        return False
    return line.split(b" ")[1:2] == [b"200"]


async def _ready(child: Child, port: int, timeout_s: float, path: str = "/health") -> Peer:
    await child.until(lambda: answers(port, path), f"it answers {path}", timeout_s)
    return Peer(child, f"http://127.0.0.1:{port}")


async def vllm_router(children: Children, environment: Path, *engine_ports: int, policy: str = "cache_aware") -> Peer:
    """Start vllm-router in front of one server or several servers. Raises DidNotStart or NoPeers."""
    port = free_port()
    command = [program(environment, "vllm-router"), "--host", "127.0.0.1", "--port", str(port)]
    command += ["--worker-urls", *(f"http://127.0.0.1:{engine}" for engine in engine_ports), "--policy", policy]
    command += ["--prometheus-port", str(free_port()), "--prometheus-host", "127.0.0.1", "--log-level", "warning"]
    child = children.start("vllm-router", ROUTER, command)
    return await _ready(child, port, READY_S)


async def smg(children: Children, environment: Path, engine_port: int, tokenizer: Path) -> Peer:
    """Start SMG, a router for LLM servers, in front of one server. SMG speaks HTTP and uses the policy `cache_aware`.
    Raises DidNotStart or NoPeers."""
    port = free_port()
    command = [program(environment, "smg"), "launch", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--worker-urls", f"http://127.0.0.1:{engine_port}", "--policy", "cache_aware"]
    command += ["--prometheus-port", str(free_port()), "--prometheus-host", "127.0.0.1", "--log-level", "warn"]
    command += ["--tokenizer-path", str(tokenizer)]
    child = children.start("smg", "smg", command)
    return await _ready(child, port, READY_S)


async def litellm(children: Children, environment: Path, engine_port: int, model: str, folder: Path) -> Peer:
    """Start LiteLLM's proxy with one worker, in front of one server. Raises DidNotStart or NoPeers."""
    port = free_port()
    entry = {"model": f"hosted_vllm/{model}", "api_base": f"http://127.0.0.1:{engine_port}/v1", "api_key": "none"}
    configuration = folder / "litellm.yaml"
    configuration.write_text(json.dumps({"model_list": [{"model_name": model, "litellm_params": entry}]}))
    command = [program(environment, "litellm"), "--config", str(configuration), "--host", "127.0.0.1"]
    command += ["--port", str(port), "--num_workers", "1", "--telemetry", "False"]
    variables = {
        "LITELLM_LOG": "ERROR",
        "LITELLM_LOCAL_MODEL_COST_MAP": "True",  # otherwise LiteLLM downloads a file
        "LITELLM_DANGEROUSLY_PERMIT_WEAK_OR_UNSET_MASTER_KEY": "true",  # loopback only, and no other peer checks a key
    }
    child = children.start("litellm", "litellm", command, variables)
    return await _ready(child, port, READY_S, "/health/liveliness")


async def vllm_server(
    children: Children, model: str, folder: Path, engine: Mapping[str, object], environment: Mapping[str, str]
) -> tuple[Peer, int]:
    """Start vLLM's own OpenAI server, unmodified, with the same engine arguments as ours; return the peer and its port.
    Raises DidNotStart.
    """
    port = free_port()
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder)]
    command += ["--served-model-name", model, "--host", "127.0.0.1", "--port", str(port)]
    command += [*flags(engine), "--disable-uvicorn-access-log"]
    # vLLM's server leaves its rendezvous file behind. Compiled code is shared with other engines all the same.
    own = {"TMPDIR": children.temporary, "TORCHINDUCTOR_CACHE_DIR": f"{gettempdir()}/torchinductor_{getuser()}"}
    child = children.start("vllm-server", "vllm server", command, {**own, **environment})
    return await _ready(child, port, ENGINE_READY_S), port


def flags(arguments: Mapping[str, object]) -> Sequence[str]:
    """Return engine arguments as options of vLLM's command line. A list is an option with several values."""
    out: list[str] = []
    for name, value in arguments.items():
        flag = "--" + name.replace("_", "-")
        values = value if isinstance(value, (list, tuple)) else () if value is True else (value,)
        out += [flag, *map(str, values)]
    return out
