"""Our serving side without Ray: gateway processes and a worker process that dials the gateways, on loopback."""

from __future__ import annotations

import asyncio
import json
import signal
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import yaml

from cluster.cli.local.gateway_metrics import gateway_rows
from cluster.cli.local.ports import choose_ports
from cluster.config.document import parse
from cluster.v1 import inference_pb2 as pb
from cluster.v1 import inference_pb2_grpc as pb_grpc
from loadtests.children import ROOT, Child, Children
from loadtests.serving import tenants

GATEWAY, WORKER = "gateway", "worker replica"
MODEL = "bench"
LISTENERS = ("grpc", "http", "link", "admin", "metrics")
READY_FILE = "ready.json"
READY_S = 120.0
ENGINE_READY_S = 540.0
PREPARE_S = 540.0


async def prepare(children: Children, kind: str, folder: Path) -> tuple[Path, Path]:
    """Return the model folder and the bundle folder for the model kind `kind`. Folders that are missing in `folder` are
    created by the program loadtests.serving.prepare. Raises DidNotStart."""
    name = Path(kind).name
    made = folder / name
    child = children.start(
        f"prepare-{name}", "preparation", [sys.executable, "-m", "loadtests.serving.prepare", kind, str(made)]
    )

    async def there() -> bool:
        return (made / "bundle").exists() and (made / "model").exists()

    await child.until(there, "model and bundle are written", PREPARE_S)
    await child.stop()
    return made / "model", made / "bundle"


def plain_tokens(model: Path) -> str:
    """Return URL parameters that make a simulated engine emit only tokens of ASCII letters. With other tokens, a server
    may have to hold back text until the next token.

    `token_lo` and `token_hi` bound the longest range of ids in which every token is of this kind. The parameter
    `salted` is read only on Headrace's side. It does not change the text, so both servers stay comparable.
    """
    vocabulary = json.loads((model / "tokenizer.json").read_text())["model"]["vocab"]
    letters = {i for piece, i in vocabulary.items() if (word := piece.lstrip("Ġ▁")).isascii() and word.isalpha()}
    longest = range(0)
    for low in (i for i in letters if i - 1 not in letters):
        high = low
        while high in letters:
            high += 1
        longest = max(longest, range(low, high), key=len)
    return f"token_lo={longest.start}&token_hi={longest.stop}&salted=0"


def configuration(
    model: str,
    home: Path,
    processes: int = 1,
    *,
    log_level: str = "warning",
    more: Mapping[str, object] | None = None,
    observe: Mapping[str, object] | None = None,
    **addresses: str,
) -> str:
    """Return a cluster.yaml for gateways. Listeners named in `addresses` have the given addresses, the others get free
    loopback ports. Keys, limits and ledger are those that tenants.make_key makes in `home`. `more`: keys of the section
    gateway. `observe`: keys of the section observe."""
    gateway: dict[str, Any] = {
        "listen": dict.fromkeys(LISTENERS, "127.0.0.1:0") | addresses,
        "processes": processes,
        "drain_timeout_s": 0,
        "max_message_bytes": 64 << 20,
        **(more or {}),
    }
    whole = {
        "api_version": "headrace/v1",
        "name": "loadtest",
        "gateway": gateway,
        "observe": {"log_level": log_level, **(observe or {})},
        "models": [{"name": model, "source": "sim:///worker-of-the-load-test"}],
        **tenants.sections(home),
    }
    if processes > 1:
        gateway["listen"] = choose_ports(parse(yaml.safe_dump(whole))).gateway.listen.model_dump()
    return yaml.safe_dump(whole)


@dataclass(frozen=True, slots=True)
class Ours:
    """A running gateway with its worker. `siblings`: further gateway processes and their endpoints."""

    gateway: Child
    worker: Child
    endpoints: Mapping[str, str]
    key: str
    model: str = MODEL
    siblings: Sequence[tuple[Child, Mapping[str, str]]] = ()
    keys: Sequence[str] = ()
    """A key of each tenant; the first is `key`."""

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        """gRPC metadata with the credentials of a call."""
        return authorization(self.key)

    @property
    def grpc(self) -> str:
        """host:port of the gRPC API."""
        return self.endpoints["grpc"]

    @property
    def http(self) -> str:
        """Root URL of the HTTP API; empty if this build has no HTTP API."""
        return f"http://{self.endpoints['http']}" if "http" in self.endpoints else ""

    @property
    def roots(self) -> list[tuple[int, str]]:
        """Root processes of our cluster, in the form that processes.snapshot expects."""
        return [
            (child.pid, child.kind) for child in (self.gateway, *(child for child, _ in self.siblings), self.worker)
        ]


def authorization(key: str) -> tuple[tuple[str, str], ...]:
    """Return a key as gRPC metadata."""
    return (("authorization", f"Bearer {key}"),)


def exec_gateway(
    children: Children,
    folder: Path,
    name: str,
    text: str,
    witness: tuple[str, ...] = (),
    process: int = 0,
    checkout: Path = ROOT,
    descriptors: int = 0,
) -> Child:
    """Start a gateway with an empty folder of its own. The gateway writes READY_FILE in `folder/name` once it serves.
    `witness`: options of the measurements in the gateway's process (serving/gateway.py); without any, nothing is
    measured there. `descriptors`: hard limit of the gateway's file descriptors, 0 for the limit of this process."""
    home = folder / name
    home.mkdir(parents=True, exist_ok=True)
    (home / "cluster.yaml").write_text(text)
    program = ["-m", "loadtests.serving.gateway", *witness, "--"] if witness else ["-m", "cluster.cli.main"]
    command = [sys.executable, *program, "gateway", "-f", str(home / "cluster.yaml"), "--folder", str(home / "state")]
    command += ["--ready-file", str(home / READY_FILE), *(("--process", str(process)) if process else ())]
    limited = ["bash", "-c", 'ulimit -n "$1"; shift; exec "$@"', "limited", str(descriptors)] if descriptors else []
    return children.start(name, GATEWAY, [*limited, *command], checkout=checkout)


async def start_gateways(
    children: Children,
    folder: Path,
    name: str,
    home: Path,
    *,
    processes: int = 1,
    witness: tuple[str, ...] = (),
    checkout: Path = ROOT,
    descriptors: int = 0,
    observe: Mapping[str, object] | None = None,
) -> list[tuple[Child, Mapping[str, str]]]:
    """Start gateway processes on one port; return each process with its endpoints by listener. Raises DidNotStart.

    `home`: folder with the tenants' database, filled by tenants.make_key. `witness`: command-line options of
    loadtests.serving.gateway, a program that runs the gateway and measures its event loop. If `witness` is empty, the
    gateway runs without this program. `observe`: keys of the configuration section `observe`.
    """
    text, out = configuration(MODEL, home, processes, observe=observe), []
    for process in range(processes):
        own = f"{name}-{process}" if process else name
        child = exec_gateway(children, folder, own, text, witness, process, checkout, descriptors)
        ready = folder / own / READY_FILE

        async def there(ready: Path = ready) -> bool:
            return ready.exists()

        await child.until(there, "it serves", READY_S)
        out.append((child, json.loads(ready.read_text())["endpoints"]))
    return out


async def start(
    children: Children,
    folder: Path,
    *,
    bundle: Path,
    source: str,
    engine: Mapping[str, object] | None = None,
    name: str = "ours",
    kind: str = WORKER,
    witness: tuple[str, ...] = (),
    environment: Mapping[str, str] | None = None,
    processes: int = 1,
    checkout: Path = ROOT,
    descriptors: int = 0,
    tenant_count: int = 1,
    observe: Mapping[str, object] | None = None,
) -> Ours:
    """Start a gateway and a worker; return when the model is ready. Raises DidNotStart.

    `source`: `sim:///folder?...` for a simulated engine, or a model folder for vLLM. `engine`: arguments for vLLM.
    `witness`: options of loadtests/serving/gateway.py, which measures the gateway from within its process; without
    options, nothing is measured there. `processes`: number of gateway processes. `checkout`: the source tree that
    both programs run. `descriptors`: hard limit of the gateway's file descriptors. `observe`: keys of the
    configuration section `observe`.
    """
    home = folder / f"{name}-tenants"
    keys = await tenants.make_tenants(home, tenant_count)
    key = keys[0]
    first, *siblings = await start_gateways(
        children, folder, f"{name}-gateway", home, processes=processes, witness=witness,
        checkout=checkout, descriptors=descriptors, observe=observe,
    )  # fmt: skip
    gateway, endpoints = first
    ready = folder / f"{name}-worker.ready"
    ready.unlink(missing_ok=True)
    command = [sys.executable, "-m", "loadtests.serving.worker", "--name", MODEL, "--link", endpoints["link"]]
    command += ["--bundle", str(bundle), "--source", source, "--ready", str(ready)]
    command += ["--engine", json.dumps(dict(engine or {}))]
    worker = children.start(f"{name}-worker", kind, command, environment, checkout)

    async def engine_runs() -> bool:
        return ready.exists()

    await worker.until(engine_runs, "its engine runs", ENGINE_READY_S)
    async with grpc.aio.insecure_channel(endpoints["grpc"]) as channel:
        stub = pb_grpc.InferenceStub(channel)

        async def model_ready() -> bool:
            try:
                model = await stub.GetModel(pb.GetModelRequest(name=MODEL), timeout=5.0, metadata=authorization(key))
            except grpc.aio.AioRpcError:
                return False
            return model.state == pb.Model.STATE_READY

        await worker.until(model_ready, "the gateway calls the model ready", READY_S)

    async def linked() -> bool:
        processes = [addresses for _, addresses in (first, *siblings)]
        return all(row["workers"] for row in await asyncio.to_thread(gateway_rows, processes))

    if siblings:
        await worker.until(linked, "every gateway process has its link", READY_S)
    return Ours(gateway, worker, endpoints, key, siblings=siblings, keys=keys)


async def read_stalls(ours: Ours, path: Path) -> dict[str, float]:
    """Return how long the gateway's event loop was blocked since the last call of this function. The gateway must have
    been started with the `witness` option `--stalls PATH`, where PATH is `path`."""
    path.unlink(missing_ok=True)
    for process in ours.gateway.commands():
        process.send_signal(signal.SIGUSR1)
    for _ in range(200):
        if path.exists():
            stalls: dict[str, float] = json.loads(path.read_text())
            return stalls
        await asyncio.sleep(0.02)
    raise RuntimeError("the gateway wrote no stalls")
