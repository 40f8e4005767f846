"""The dashboards have data from a real Prometheus, which scrapes a gateway process and a controller with workers under
load.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import grpc
import pytest
import yaml

from cluster.api.types import ModelSpec, WorkerIdentity
from cluster.config.document import parse
from cluster.controller import scaling
from cluster.controller.controller import Controller
from cluster.controller.controller_metrics import controller_metrics
from cluster.controller.desired_models import DesiredModels
from cluster.controller.gauges import ray_samples
from cluster.controller.links import ControllerLinks
from cluster.controller.published_catalog import PublishedCatalog
from cluster.gateway.metrics_page import metrics_served
from cluster.ledger.store import Ledger
from cluster.observe.metrics import Metrics
from cluster.policy.catalog.lifecycle import SourceFacts
from cluster.policy.routing.version_split import choose_version
from cluster.policy.scaling.inputs import ScalingSettings
from cluster.policy.scaling.scaler import Scaler
from cluster.policy.tenants.policy import TenantPolicy
from cluster.ray.several_clusters import MultiClusterBackend
from cluster.wire.bundle import Bundle
from cluster.wire.dial import read
from cluster.wire.tls import TlsFiles
from cluster.worker.engine.simulated.engine import SimEngine
from cluster.worker.session import WorkerSession
from cluster.worker.settings import ReplicaSettings
from cluster.worker.starting import StartingReports
from cluster.worker.weights.fetch_progress import FetchProgress
from scripts.chart_schema import RULES, VALUES, plain_rules
from scripts.dashboards.__main__ import FOLDER, generated
from tests.support.calls import chat, rest_of
from tests.support.certificates import Authority
from tests.support.checkpoints import build_checkpoint
from tests.support.cluster import PATIENT, bundle_of, sim_engine
from tests.support.fake_ray import FakeRay
from tests.support.gateway_process import gateway_process
from tests.support.keyed import PEPPER, bearer, eventually, keyed_text
from tests.support.prometheus import Prometheus, prometheus

pytestmark = [pytest.mark.slow, pytest.mark.needs("promtool")]

GUARD = {"builtin": "patterns", "on": "input", "action": "redact", "patterns": {"key": "sk-[a-z]{8}"}}
TENANTS: list[dict[str, Any]] = [
    {"name": "acme", "limits": {"tokens_per_minute": 10_000_000}, "guards": [GUARD]},
    {"name": "small", "limits": {"monthly_tokens": 1000}},
]
LONG = "a story of a worker who counts tokens all day " * 60
"""Prompt of several hundred tokens, which gateways expect in a worker's prefix cache once it has run."""
SHARES = (("v1", 0.5), ("v2", 0.5))
"""Shares of the calls by version."""
WAIT_S = 60.0
VARIABLES = {
    "$__rate_interval": "30s",
    "$__range": "60s",
    "$cluster": "test",
    "$model": ".*",
    "$tenant": ".*",
    "$price": "2.50",
}
BOARDS = {file.stem: file.read_text() for file in sorted(FOLDER.glob("*.json"))}
"""The dashboards by name."""


def queries(text: str) -> list[tuple[str, str]]:
    """Return (name of the panel or annotation, query) for each query of a dashboard, with values put in for its
    variables."""
    dashboard = json.loads(text)
    found = [(panel["title"], target["expr"]) for panel in dashboard["panels"] for target in panel.get("targets", [])]
    found += [(item["name"], item["expr"]) for item in dashboard["annotations"]["list"]]
    filled = []
    for at, (where, query) in enumerate(found):
        for name, value in VARIABLES.items():
            query = query.replace(name, value)
        assert "$" not in query, f"{dashboard['title']}, {where}: a variable without a value: {query}"
        unique = where if where not in dict(found[:at]) else f"{where} ({at})"
        filled.append((f"{dashboard['title']}, {unique}", query))
    return filled


@dataclass(eq=False)
class Fleet:
    """Workers with simulated engines, of two model versions, and a controller. To the controller, the workers seem to
    run on a Ray cluster."""

    checkpoint: Path
    bundle: Bundle
    link: str
    tls: TlsFiles
    sessions: list[tuple[SimEngine, WorkerSession, asyncio.Task[None]]]

    async def add(self, name: str, settings: ReplicaSettings) -> None:
        """Start a worker of the model version in `settings`."""
        engine = sim_engine(self.checkpoint, decode_ms=2, max_model_len=4096)
        info = await engine.start()
        identity = WorkerIdentity(
            worker_id=f"sim-{name}",
            incarnation=f"i-{name}",
            model="sim",
            bundle_digest=self.bundle.digest,
            version=settings.spec.version,
            generation=settings.digest,
            weight_digest="w",
            pod=f"pod-{name}",
            host=f"node-{name}",
            gpu="H100",
        )
        session = WorkerSession(
            identity=identity, engine=engine, info=info, bundle=self.bundle, gateways=[self.link], tls=self.tls,
            timing=PATIENT, gpus=1.0, gpu="H100", kv_events=engine, engine_counts=engine.counts,
        )  # fmt: skip
        self.sessions.append((engine, session, asyncio.create_task(_run(session))))

    async def stop(self) -> None:
        """Stop all workers."""
        for _, session, task in self.sessions:
            await session.close()
            await asyncio.gather(task, return_exceptions=True)


async def _run(session: WorkerSession) -> None:
    await session.run()


@asynccontextmanager
async def controlled(
    fleet: Fleet, stable: ReplicaSettings, canary: ReplicaSettings, metrics: Metrics
) -> AsyncIterator[None]:
    """Run a controller that exports its metrics, with a fake Ray on which both model versions run."""
    ray = FakeRay()
    backend = MultiClusterBackend({"local": ray})
    models = DesiredModels()
    scaler = Scaler(ScalingSettings(), time.monotonic(), decide_s=0.5)
    links = ControllerLinks(
        controller_id="c",
        gateways=[fleet.link],
        tls=fleet.tls,
        bundles=lambda digest: fleet.bundle,
        listener=scaling.DemandRecorder(scaler, models.changed.set),
    )
    known = {of.app: SourceFacts(bundle_digest=fleet.bundle.digest, max_model_len=4096) for of in (stable, canary)}
    controller = Controller(backend, links, models, PublishedCatalog(known), scaler=scaler)
    controller.counters = scaling.Counters(metrics)
    metrics.add_gauges(lambda: ray_samples(backend, controller))
    models.want([stable, canary])
    tasks = [asyncio.create_task(links.run()), asyncio.create_task(controller.run())]
    try:
        await eventually(lambda: _done(len(ray.apps) == 2), "both versions are deployed")
        ray.change(stable.app, target=2, running=2)
        ray.change(canary.app, running=1)
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _done(holds: bool) -> bool:
    return holds


async def callers(stub: Any, keys: Sequence[str]) -> None:
    """Make calls until cancelled: calls with long and with short prompts, and calls that are refused."""
    number = 0
    while True:
        number += 1
        for at, key in enumerate(keys):
            text = LONG if number % 2 else f"my key is sk-abcdefgh, number {number} of {at}"
            await _ask(stub, chat(text, max_tokens=8, ignore_eos=True), key)
        await _ask(stub, chat(model="nope"), keys[0])
        await _ask(stub, chat(), "sk-wrong")


async def _ask(stub: Any, request: Any, key: str) -> None:
    with contextlib.suppress(grpc.aio.AioRpcError):
        await stub.Chat(request, metadata=bearer(key), timeout=60)


async def lose_a_worker(stub: Any, key: str, fleet: Fleet) -> None:
    """Make a call to the stable version and kill the engine that runs it. The version's other worker then resumes the
    call. No other call may run meanwhile."""
    request_id = next(name for name in map("r{}".format, range(1000)) if choose_version(name, SHARES) == "v1")
    metadata = (*bearer(key), ("x-request-id", request_id))
    stream = stub.StreamChat(chat(max_tokens=400, ignore_eos=True), metadata=metadata, timeout=120)
    await read(stream)
    (engine,) = [engine for engine, _, _ in fleet.sessions if engine.load().running]
    engine.faults.kill()
    await rest_of(stream)


def settings_of(version: str, link: str, **fields: Any) -> ReplicaSettings:
    """Return the settings of the replicas of a model version."""
    return ReplicaSettings(
        ModelSpec("sim", "sim://x", version=version, max_replicas=4, gpu="H100", **fields), "test", (link,)
    )


@pytest.fixture(scope="module")
async def scraped(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Prometheus]:
    """A Prometheus with the chart's rules. It has scraped a cluster of a gateway, a controller and three workers."""
    folder = tmp_path_factory.mktemp("dashboards")
    checkpoint = build_checkpoint("llama", folder / "llama")
    own, peer = _pair(folder)
    link_tls = f"  link_tls: {{cert_file: {own.cert_file}, key_file: {own.key_file}, ca_file: {own.ca_file}}}\n"
    text = keyed_text(folder / "site", gateway=link_tls)
    ledger = Ledger(f"sqlite:///{folder / 'site' / 'ledger.db'}", peppers=(PEPPER.encode(),))
    ledger.upgrade()
    for tenant in TENANTS:
        ledger.tenants.create(TenantPolicy.from_json(tenant))
    keys = [ledger.keys.create(tenant["name"], "").secret for tenant in TENANTS]
    ledger.close()
    exported, gauges = controller_metrics(parse(text))
    gauges.leads = True
    async with contextlib.AsyncExitStack() as stack:
        gateway = await stack.enter_async_context(gateway_process(folder / "gateway", text))
        fleet = Fleet(checkpoint, bundle_of(checkpoint), gateway.link, peer, [])
        stack.push_async_callback(fleet.stop)
        stable = settings_of("v1", gateway.link, weight=0.5)
        canary = settings_of("v2", gateway.link, weight=0.5, error_ratio=50.0, ttft_ratio=50.0)
        await stack.enter_async_context(controlled(fleet, stable, canary, exported))
        port = await stack.enter_async_context(metrics_served(exported, "127.0.0.1", 0))
        for name, of in (("a", stable), ("b", stable), ("c", canary)):
            await fleet.add(name, of)
        fetching = StartingReports("sim-d", "pod-d", "node-d", "H100", replace(stable, tls=peer), half_fetched())
        starting = asyncio.create_task(fetching.run())
        stack.callback(starting.cancel)
        targets = {"gateway": [gateway.endpoints["metrics"]], "controller": [f"127.0.0.1:{port}"]}
        made = await stack.enter_async_context(prometheus(folder / "prometheus", targets, rules_text()))
        ready = 'headrace_model_version_workers{version="v1"} == 2 and on () headrace_model_version_workers == 1'
        await eventually(lambda: made.has(ready), "all workers are linked", WAIT_S)
        await lose_a_worker(gateway.stub, keys[0], fleet)
        load = asyncio.create_task(callers(gateway.stub, keys))
        try:
            yield made
        finally:
            load.cancel()
            await asyncio.gather(load, return_exceptions=True)


def half_fetched() -> FetchProgress:
    """Return the progress of a worker that has fetched half of its weights."""
    progress = FetchProgress()
    progress.report(500, 1000)
    return progress


def _pair(folder: Path) -> tuple[TlsFiles, TlsFiles]:
    authority = Authority(folder / "authority")
    return authority.issue("gateway"), authority.issue("worker")


def rules_text() -> str:
    """Return the chart's rules for this cluster. They are evaluated every second instead of every 30 seconds."""
    values = yaml.safe_load(VALUES.read_text())
    values["config"]["name"] = "test"
    return plain_rules(RULES.read_text(), values).replace("interval: 30s", "interval: 1s")


def test_dashboards_are_those_of_the_script() -> None:
    """The dashboard files of the chart are those that scripts/dashboards writes."""
    assert {path: path.read_text() for path in FOLDER.glob("*.json")} == generated()


@pytest.mark.parametrize("board", BOARDS)
async def test_every_panel_has_data(board: str, scraped: Prometheus) -> None:
    """The query of every panel returns at least one series. Prometheus accepts the queries of annotations."""
    annotations = {item["name"] for item in json.loads(BOARDS[board])["annotations"]["list"]}
    missing = dict(queries(BOARDS[board]))
    assert len(missing) > len(annotations)
    deadline = time.monotonic() + WAIT_S
    while missing and time.monotonic() < deadline:
        answers = {where: await scraped.query(query) for where, query in missing.items()}
        missing = {
            where: query
            for where, query in missing.items()
            if not answers[where] and where.split(", ", 1)[1] not in annotations
        }
        await asyncio.sleep(0.5 if missing else 0)
    assert not missing, "no data: " + "\n".join(f"{where}: {query}" for where, query in missing.items())


@pytest.mark.parametrize("board", BOARDS)
def test_panels_explain_themselves(board: str) -> None:
    """Every panel has a description, every panel except tables has a unit, and all links lead to dashboards and
    runbooks that exist."""
    dashboard = json.loads(BOARDS[board])
    assert dashboard["description"]
    assert {item["name"] for item in dashboard["templating"]["list"]} >= {"datasource", "cluster"}
    kinds = set()
    for panel in dashboard["panels"]:
        if panel["type"] == "row":
            continue
        kinds.add(panel["type"])
        assert panel["description"].endswith("."), panel["title"]
        if panel["type"] != "table":
            assert panel["fieldConfig"]["defaults"]["unit"], panel["title"]
    assert "timeseries" in kinds
    boards = {json.loads(text)["uid"] for text in BOARDS.values()}
    for address in re.findall(r'"url": "([^"]*)"', BOARDS[board]):
        if address.startswith("/d/"):
            assert address.split("/")[2].split("?")[0] in boards, address
        elif "${" not in address:
            assert (FOLDER.parents[2] / address).exists(), address


def test_stat_and_table_panels_are_used() -> None:
    """The dashboards have panels of three kinds: single numbers, tables and series over time."""
    types = {panel["type"] for text in BOARDS.values() for panel in json.loads(text)["panels"]}
    assert types == {"row", "stat", "table", "timeseries"}
