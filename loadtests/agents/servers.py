"""Functions that start both sides of a comparison: vLLM's own servers, and a gateway with workers. The engines of both
sides emit the same scripted tokens."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from cluster.process.ports import free_port
from loadtests.agents.compare import Server
from loadtests.children import Child, Children
from loadtests.serving import ours, tenants

READY_S = 300.0
ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "WARNING"}


@dataclass(frozen=True, slots=True)
class Side:
    """One of the two compared systems: the server of each model, and the log of the prompts that the engines got."""

    servers: Mapping[str, Server]
    prompts: Path

    def close(self) -> None:
        """Close the clients' connections."""
        for server in self.servers.values():
            server.close()


async def prepare(children: Children, folder: Path, texts: Mapping[str, Mapping[str, str]]) -> list[dict[str, Any]]:
    """Write model, bundle and scripts of each family; return the families' entries for vllm_server.py and worker.py."""
    file, made = folder / "texts.json", folder / "families"
    file.write_text(json.dumps(texts))
    return await prepare_models(children, "loadtests.agents.prepare", file, made)


async def prepare_models(children: Children, module: str, file: Path, made: Path) -> list[dict[str, Any]]:
    """Run a program that writes models into the folder `made`; return the entries in its `models.json`."""
    child = children.start("prepare", "preparation", [sys.executable, "-m", module, str(file), str(made)])
    listed = made / "models.json"
    await child.until(lambda: _exists(listed), "models and scripts are written", READY_S)
    await child.stop()
    entries: list[dict[str, Any]] = json.loads(listed.read_text())
    return entries


async def start_vllm(children: Children, folder: Path, models: Sequence[Mapping[str, Any]]) -> Side:
    """Start vLLM's own server for each model, with the model's scripts. Raises DidNotStart."""
    entries = [{**model, "port": free_port()} for model in models]
    prompts = folder / "vllm.prompts"
    await start_program(
        children, folder, "vllm-servers", "loadtests.agents.vllm_server", {"models": entries, "prompts": prompts}
    )
    return Side({entry["name"]: Server(entry["port"]) for entry in entries}, prompts)


async def start_headrace(
    children: Children, folder: Path, models: Sequence[Mapping[str, Any]], seed: int, name: str = "headrace"
) -> Side:
    """Start a gateway, and a worker for each model in one process. Raises DidNotStart."""
    gateway = await start_gateway(children, folder, [model["name"] for model in models], name)
    prompts = folder / f"{name}.prompts"
    given = {"models": models, "link": gateway.endpoints["link"], "seed": seed, "prompts": prompts}
    worker = await start_program(children, folder, f"{name}-worker", "loadtests.agents.worker", given)
    servers = {model["name"]: Server(gateway.port, gateway.key) for model in models}

    async def all_ready() -> bool:
        return await servers[models[0]["name"]].ready_models() >= servers.keys()

    await worker.until(all_ready, "the gateway lists all models", READY_S)
    return Side(servers, prompts)


@dataclass(frozen=True, slots=True)
class Gateway:
    """A gateway without workers. `endpoints`: address of each listener. `key`: API key of a tenant."""

    endpoints: Mapping[str, str]
    key: str

    @property
    def port(self) -> int:
        """Port of the HTTP APIs on loopback."""
        return int(self.endpoints["http"].rpartition(":")[2])


async def start_gateway(children: Children, folder: Path, models: Sequence[str], name: str) -> Gateway:
    """Start a gateway that knows the names of models. Raises DidNotStart."""
    home = folder / f"{name}-tenants"
    key = await tenants.make_key(home)
    config = yaml.safe_load(ours.configuration(ours.MODEL, home))
    config["models"] = [{"name": model, "source": "sim:///worker-of-the-load-test"} for model in models]
    gateway = ours.exec_gateway(children, folder, f"{name}-gateway", yaml.safe_dump(config))
    ready = folder / f"{name}-gateway" / ours.READY_FILE
    await gateway.until(lambda: _exists(ready), "it serves", ours.READY_S)
    return Gateway(json.loads(ready.read_text())["endpoints"], key)


async def start_program(
    children: Children,
    folder: Path,
    name: str,
    module: str,
    given: Mapping[str, Any],
    environment: Mapping[str, str] | None = None,
) -> Child:
    """Start a program that takes its settings from a JSON file; return when it has written its ready file."""
    ready, file = folder / f"{name}.ready", folder / f"{name}.json"
    ready.unlink(missing_ok=True)
    file.write_text(json.dumps({**given, "ready": ready}, default=str))
    child = children.start(
        name, name, [sys.executable, "-m", module, str(file)], {**ENVIRONMENT, **(environment or {})}
    )
    await child.until(lambda: _exists(ready), "it serves", READY_S)
    return child


async def _exists(path: Path) -> bool:
    return await asyncio.to_thread(path.exists)
