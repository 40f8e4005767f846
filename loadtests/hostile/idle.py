"""Test of a gateway with 256 file descriptors while a thousand idle anonymous connections are open on all its ports.

Every second, each port is tried on a new connection: health over gRPC and HTTP, a tenant's call over gRPC and HTTP,
the admin API and the metrics page. The test measures which of these are still served. A second worker dials the link
port; the gateway must then have the links of both workers.
"""

from __future__ import annotations

import asyncio
import http.client
import json
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from cluster.admin.v1 import admin_pb2, admin_pb2_grpc
from cluster.ledger.files import read_secrets
from cluster.observe.exposition import samples
from cluster.policy.tenants.identity import admin_token
from cluster.v1 import inference_pb2 as pb
from cluster.v1 import inference_pb2_grpc as pb_grpc
from loadtests.children import Child
from loadtests.figures import Bound, Figure
from loadtests.processes import SIMULATED
from loadtests.scenarios.common import Stage
from loadtests.scenarios.parts import exact
from loadtests.serving import ours as serving

DESCRIPTORS, STRANGERS = 256, 1000
LASTS_S, EVERY_S, ANSWER_S, READY_S = 30.0, 1.0, 5.0, 60.0
BOTH = 2
"""Number of workers: one from before the attack, and one that starts during the attack."""
UNANSWERED = "1,000 idle connections, 256 descriptors: questions to all ports without an answer"
LOG = "the gateway's log meanwhile"
ROWS: Mapping[str, Bound] = {UNANSWERED: Bound("<=", 0), LOG: Bound("<=", 1.0)}
OWN = (("grpc.use_local_subchannel_pool", 1),)
Probe = Callable[[], Awaitable[None]]


async def measure(stage: Stage) -> list[Figure]:
    """Start all processes, attack, and make the calls; return the report's rows."""
    model, bundle = await serving.prepare(stage.children, "tokenizer", stage.folder)
    source = f"sim://{model}?decode_ms=5&{serving.plain_tokens(model)}"
    ours = await serving.start(
        stage.children, stage.folder, bundle=bundle, source=source, kind=SIMULATED, name="idle",
        descriptors=DESCRIPTORS,
    )  # fmt: skip
    secret = read_secrets(stage.folder / "idle-tenants" / "cluster-secret", "cluster-secret")[0]
    probes = probes_of(ours, admin_token(secret))
    logged = ours.gateway.log.stat().st_size
    await begin_attack(stage, ours)
    second = start_worker(stage, ours, bundle, source)
    answered, missed = await run_probes(probes, LASTS_S)
    (answered if await linked(ours) == BOTH else missed)["link"] += 1
    written = (ours.gateway.log.stat().st_size - logged) / (1 << 20)
    for child in (second, ours.worker, ours.gateway):
        await child.stop()
    note = f"{sum(answered.values())} answers"
    if missed:
        note += "; without: " + ", ".join(f"{name} {count}" for name, count in missed.items())
    return [
        exact(UNANSWERED, sum(missed.values()), ROWS[UNANSWERED], "questions", note),
        exact(LOG, written, ROWS[LOG], "MiB", f"in {LASTS_S:g} s"),
    ]


async def linked(ours: serving.Ours) -> float:
    """Return the number of workers that the gateway reports; 0 if the gateway does not answer."""
    try:
        page = await asyncio.to_thread(fetch, ours.endpoints["metrics"], "GET", "/metrics", "", ours.key)
    except (OSError, http.client.HTTPException):
        return 0
    of_workers = ("headrace_link_connected", "worker")
    return sum(value for name, labels, value in samples(page) if (name, labels.get("api")) == of_workers)


async def begin_attack(stage: Stage, ours: serving.Ours) -> None:
    """Start idle clients on all ports; return when each client has connected once."""
    ready = stage.folder / "strangers.ready"
    ports = [f"--port={name}={ours.endpoints[name]}" for name in serving.LISTENERS]
    command = [sys.executable, "-m", "loadtests.hostile.strangers", f"--count={STRANGERS}", f"--ready={ready}", *ports]
    child = stage.children.start("strangers", "attack", command)

    async def there() -> bool:
        return ready.exists()

    await child.until(there, "all strangers have come", READY_S)


def start_worker(stage: Stage, ours: serving.Ours, bundle: Path, source: str) -> Child:
    """Start a second worker, which dials the link port while idle clients hold that port."""
    command = [sys.executable, "-m", "loadtests.serving.worker", "--name", ours.model, "--id", "second"]
    command += ["--link", ours.endpoints["link"], "--bundle", str(bundle), "--source", source]
    command += ["--ready", str(stage.folder / "second.ready"), "--engine", json.dumps({})]
    return stage.children.start("second-worker", SIMULATED, command)


async def run_probes(probes: Mapping[str, Probe], seconds: float) -> tuple[Counter[str], Counter[str]]:
    """Make each call in `probes` again and again, for `seconds` seconds. Returns the numbers of answered calls and of
    failed calls, by name of the call."""
    answered, missed = Counter[str](), Counter[str]()
    ends = time.monotonic() + seconds

    async def probe_repeatedly(name: str, probe: Probe) -> None:
        while time.monotonic() < ends:
            begun = time.monotonic()
            try:
                async with asyncio.timeout(ANSWER_S):
                    await probe()
                answered[name] += 1
            except (grpc.aio.AioRpcError, OSError, TimeoutError, http.client.HTTPException):
                missed[name] += 1
            await asyncio.sleep(max(EVERY_S - (time.monotonic() - begun), 0))

    await asyncio.gather(*(probe_repeatedly(name, probe) for name, probe in probes.items()))
    return answered, missed


def probes_of(ours: serving.Ours, token: str) -> dict[str, Probe]:
    """Return one call for each port and kind of caller. Each call uses a new connection."""
    chat = pb.ChatRequest(model=ours.model, messages=[pb.Message(role="user", content="Hello")], max_tokens=4)
    body = json.dumps({"model": ours.model, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4})

    async def health() -> None:
        async with grpc.aio.insecure_channel(ours.grpc, options=OWN) as channel:
            stub: Any = health_pb2_grpc.HealthStub(channel)
            await stub.Check(health_pb2.HealthCheckRequest(), timeout=ANSWER_S)

    async def call() -> None:
        async with grpc.aio.insecure_channel(ours.grpc, options=OWN) as channel:
            await pb_grpc.InferenceStub(channel).Chat(chat, timeout=ANSWER_S, metadata=ours.metadata)

    async def admin() -> None:
        async with grpc.aio.insecure_channel(ours.endpoints["admin"], options=OWN) as channel:
            stub = admin_pb2_grpc.FleetStub(channel)
            await stub.ListWorkers(
                admin_pb2.ListWorkersRequest(), timeout=ANSWER_S, metadata=serving.authorization(token)
            )

    def over_http(listener: str, method: str, path: str, content: str = "") -> Probe:
        async def probe() -> None:
            await asyncio.to_thread(fetch, ours.endpoints[listener], method, path, content, ours.key)

        return probe

    return {
        "gRPC health": health,
        "HTTP health": over_http("http", "GET", "/health"),
        "gRPC call": call,
        "HTTP call": over_http("http", "POST", "/v1/chat/completions", body),
        "admin": admin,
        "metrics": over_http("metrics", "GET", "/metrics"),
    }


def fetch(address: str, method: str, path: str, content: str, key: str) -> str:
    """Return the body of the answer to one request. Raises OSError, HTTPException."""
    host, port = address.rsplit(":", 1)
    connection = http.client.HTTPConnection(host, int(port), timeout=ANSWER_S)
    try:
        headers = {"authorization": f"Bearer {key}", "content-type": "application/json"}
        connection.request(method, path, content or None, headers)
        answer = connection.getresponse()
        text = answer.read().decode()
        if answer.status != http.client.OK:
            raise http.client.HTTPException(f"{method} {path}: {answer.status}")
        return text
    finally:
        with suppress(OSError):
            connection.close()
