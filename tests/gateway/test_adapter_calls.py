"""Calls for adapters, through a real gateway, real links and workers that load the adapters."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest

from cluster.api.adapters import AdapterSpec, AdapterState, AdapterStatus
from cluster.api.types import CatalogEntry, ModelState, VersionShare
from cluster.gateway.models.adapters import AdapterView
from cluster.ledger.rows import UsageQuery
from cluster.link.v1 import link_pb2 as link_pb
from cluster.v1 import inference_pb2 as pb
from cluster.wire.bundle import Bundle
from cluster.wire.codecs.adapter_codec import adapter_report_to_pb
from cluster.wire.dial import read
from tests.support.adapter_files import NamedFiles, digest_of
from tests.support.calls import chat, refused, rest_of, resume, text_of
from tests.support.cluster import LOOPBACK, TestCluster, Worker, running_cluster, sim_engine, until
from tests.support.http import fetch
from tests.support.keyed import bearer, eventually, keyed_cluster

IMPATIENT = LOOPBACK.replace("drain_timeout_s: 0", "drain_timeout_s: 0\n  queue: {max_wait_s: 0.3}")
LORA = {"max_loras": 2, "max_cpu_loras": 4}


class Bed:
    """A cluster whose catalog has adapters of the model `sim`. All workers have the same adapter files."""

    def __init__(self, cluster: TestCluster, checkpoint: Path, bundle: Bundle) -> None:
        self.cluster = cluster
        self.files = NamedFiles()
        self.revision = 0
        self._checkpoint = checkpoint
        self._bundle = bundle

    async def worker(self, files: NamedFiles | None = None, **options: Any) -> Worker:
        """Add a worker. `files`: the adapters on its node. `options`: parameters of the engine and of the worker."""
        own = {name: options.pop(name) for name in ("version", "gateways", "wait") if name in options}
        engine = sim_engine(self._checkpoint, **{"decode_ms": 1, **LORA, **options})
        return await self.cluster.add_worker(engine, self._bundle, adapter_files=files or self.files, **own)

    def catalog(self, *adapters: AdapterSpec, **fields: Any) -> None:
        """Publish a catalog in which the model has these adapters."""
        self.revision += 1
        entry = CatalogEntry("sim", ("alias",), state=ModelState.READY, adapters=adapters, **fields)
        self.cluster.gateway.worker_events.apply_catalog([entry], self.revision)

    def view(self, name: str = "a") -> AdapterView:
        """Return the state of an adapter at the gateway."""
        return self.cluster.gateway.directory.models[0].adapters.view(name)

    async def until_ready(self, count: int, name: str = "a") -> None:
        """Wait until `count` workers accept calls for an adapter."""
        await until(lambda: self.view(name).ready == count, f"{count} workers have {name}")

    async def text(self, model: str, **fields: Any) -> str:
        """Call a model or an adapter, and return the text of the answer. Asserts that the answer has the name of the
        model or adapter."""
        answer = await self.cluster.stub.Chat(chat(model=model, ignore_eos=True, **fields), timeout=20)
        assert answer.model == model.replace("alias", "sim")
        return str(answer.choices[0].message.content)


@asynccontextmanager
async def running_bed(folder: Path, checkpoint: Path, bundle: Bundle, text: str = LOOPBACK) -> AsyncIterator[Bed]:
    """Run a gateway without workers."""
    async with running_cluster(folder, text) as cluster:
        bed = Bed(cluster, checkpoint, bundle)
        try:
            yield bed
            await cluster.until_idle()
        finally:
            bed.files.may_fetch.set()


@pytest.fixture
async def bed(tmp_path: Path, checkpoint: Path, bundle: Bundle) -> AsyncIterator[Bed]:
    """Provide a gateway without workers."""
    async with running_bed(tmp_path, checkpoint, bundle) as bed:
        yield bed


A, B = AdapterSpec("a", "/a"), AdapterSpec("b", "/b", digest_of("/b"))


async def test_adapters_are_models_of_their_own(bed: Bed) -> None:
    """Callers name an adapter as `model:adapter`, where `model` is the name or an alias of its model. The adapter
    answers differently from its model and from other adapters. Lists of models show it beside its model. All this holds
    with and without a digest in the catalog."""
    await bed.worker()
    bed.catalog(A, B)
    await bed.until_ready(1, "a")
    await bed.until_ready(1, "b")
    texts = [await bed.text(model) for model in ("sim", "sim:a", "sim:b")]
    assert len(set(texts)) == 3
    assert [await bed.text(model) for model in ("alias", "alias:a", "alias:b")] == texts
    models = {model.name: model for model in (await bed.cluster.stub.ListModels(pb.ListModelsRequest())).models}
    assert list(models) == ["sim", "sim:a", "sim:b"]
    assert list(models["sim"].adapters) == ["a", "b"]
    assert {model.state for model in models.values()} == {pb.Model.STATE_READY}
    assert models["sim:a"].weight_digest == digest_of("/a")
    assert (await bed.cluster.stub.GetModel(pb.GetModelRequest(name="alias:b"))).name == "sim:b"
    cards = {card["id"]: card for card in (await fetch(bed.cluster, "/v1/models")).json["data"]}
    assert (cards["sim:a"]["parent"], cards["sim:a"]["state"]) == ("sim", "READY")
    assert (await fetch(bed.cluster, "/v1/models/alias:b")).json["id"] == "sim:b"
    infos = await fetch(bed.cluster, "/v1/models", **{"anthropic-version": "2023-06-01"})
    assert [info["id"] for info in infos.json["data"]] == ["sim", "sim:a", "sim:b"]
    answer = await refused(bed.cluster.stub.Chat(chat(model="sim:none")))
    assert (answer.reason, "'sim:none' does not exist" in answer.message) == ("MODEL_NOT_FOUND", True)


async def test_a_call_waits_while_its_adapter_is_loaded(bed: Bed) -> None:
    """A call for an adapter that is loading waits and is answered after the load. It does not delay calls of the model
    itself. If it has a deadline, it ends at the deadline."""
    await bed.worker(max_num_seqs=2)
    bed.files.may_fetch.clear()
    bed.catalog(A)
    waiting = [asyncio.create_task(bed.text("sim:a")) for _ in range(3)]
    await until(lambda: bed.cluster.gateway.scheduler.queues.waiting("sim")[0] == 3, "they wait")
    assert all([await bed.text("sim") for _ in range(3)])
    (model,) = [
        model for model in (await bed.cluster.stub.ListModels(pb.ListModelsRequest())).models if model.name == "sim:a"
    ]
    assert model.state == pb.Model.STATE_LOADING
    late = await refused(bed.cluster.stub.Chat(chat(model="sim:a"), timeout=0.2))
    assert late.code is grpc.StatusCode.DEADLINE_EXCEEDED
    assert not any(task.done() for task in waiting)
    bed.files.may_fetch.set()
    assert len(set(await asyncio.gather(*waiting))) == 1


async def test_a_call_waits_no_longer_than_the_queue_allows(tmp_path: Path, checkpoint: Path, bundle: Bundle) -> None:
    """A call whose adapter is not loaded in time is refused with MODEL_LOADING."""
    async with running_bed(tmp_path, checkpoint, bundle, IMPATIENT) as bed:
        await bed.worker()
        bed.files.may_fetch.clear()
        bed.catalog(A)
        answer = await refused(bed.cluster.stub.Chat(chat(model="sim:a"), timeout=20))
        assert (answer.reason, "still loading" in answer.message) == ("MODEL_LOADING", True)


async def test_an_adapter_that_fails_says_why(bed: Bed) -> None:
    """If one worker cannot load an adapter, the reason is shown, and the other workers serve the adapter. If no worker
    can load it, waiting and new calls are refused with the reason."""
    broken = NamedFiles()
    broken.broken["/a"] = "rank 128 is above max_lora_rank 64"
    bed.catalog(A)
    failing = await bed.worker(broken)
    await until(lambda: bed.view().state is AdapterState.FAILED, "it has failed")
    answer = await refused(bed.cluster.stub.Chat(chat(model="sim:a"), timeout=20))
    assert (answer.reason, "rank 128 is above" in answer.message) == ("ADAPTER_INVALID", True)
    (model,) = [
        model for model in (await bed.cluster.stub.ListModels(pb.ListModelsRequest())).models if model.name == "sim:a"
    ]
    assert (model.state, model.state_reason) == (pb.Model.STATE_FAILED, broken.broken["/a"])
    bed.files.may_fetch.clear()
    good = await bed.worker()
    await until(lambda: bed.view().state is AdapterState.LOADING, "another worker may have it")
    waiting = asyncio.create_task(bed.text("sim:a"))
    await until(lambda: bed.cluster.gateway.scheduler.queues.waiting("sim")[0] == 1, "it waits")
    bed.files.may_fetch.set()
    await waiting
    await asyncio.gather(*(bed.text("sim:a") for _ in range(20)))
    assert bed.view().failures == ((failing.identity.worker_id, broken.broken["/a"]),)
    bed.files.may_fetch.clear()
    bed.files.broken["/c"] = broken.broken["/c"] = "no such folder"
    bed.catalog(AdapterSpec("c", "/c"))
    waits = asyncio.create_task(refused(bed.cluster.stub.Chat(chat(model="sim:c"), timeout=20)))
    await until(lambda: bed.cluster.gateway.scheduler.queues.waiting("sim")[0] == 1, "it waits")
    bed.files.may_fetch.set()
    assert (await waits).reason == "ADAPTER_INVALID"
    await good.stop()


async def test_workers_that_join_or_restart_get_the_adapters(bed: Bed) -> None:
    """Workers that join or restart load the adapters with no further step. Meanwhile all calls succeed."""
    bed.catalog(A)
    first = await bed.worker()
    await bed.until_ready(1)
    is_over = False

    async def call() -> int:
        answers = 0
        while not is_over:
            assert await bed.text("sim:a" if answers % 2 else "sim")
            answers += 1
        return answers

    calls = [asyncio.create_task(call()) for _ in range(4)]
    await bed.worker()
    await bed.until_ready(2)
    await first.stop()
    await bed.until_ready(1)
    await bed.worker()
    await bed.until_ready(2)
    bed.catalog(A, B)
    await bed.until_ready(2, "b")
    is_over = True
    assert all(await asyncio.gather(*calls))


async def test_old_workers_get_neither_adapters_nor_their_calls(bed: Bed) -> None:
    """A worker without the capability for adapters gets no adapters and no calls for adapters. If all workers lack the
    capability, the state of the adapter says so."""
    bed.catalog(A)
    old = await bed.worker(max_loras=0, max_cpu_loras=0)
    assert (bed.view().workers, "no worker that loads adapters" in bed.view().reason) == (0, True)
    await bed.worker()
    await bed.until_ready(1)
    await asyncio.gather(*(bed.text("sim:a") for _ in range(20)))
    (link,) = [link for link in bed.cluster.gateway.hub.links if link.identity == old.identity]
    assert (link.adapters.supported, link.adapters._sent, link.last_sent) == (False, None, 0.0)
    await asyncio.gather(*(bed.text("sim") for _ in range(20)))
    assert link.last_sent > 0


async def test_an_adapter_of_one_version_is_called_there(bed: Bed) -> None:
    """Calls for an adapter of one version go only to workers of that version, whatever the weights of the versions."""
    versions = (VersionShare("v1", 0.5), VersionShare("v2", 0.5))
    bed.catalog(A, AdapterSpec("two", "/two", version="v2"), versions=versions)
    await bed.worker(version="v1")
    await bed.worker(version="v2")
    await bed.until_ready(2)
    assert (bed.view("two").ready, bed.view("two").workers) == (1, 1)
    await asyncio.gather(*(bed.text(f"sim:{name}") for name in ("a", "two") for _ in range(15)))


async def test_an_adapter_of_a_removed_version_is_refused_at_once(bed: Bed) -> None:
    """Once the model no longer has the version of an adapter, waiting and new calls for the adapter are refused with
    the reason. The adapter can be called after it is loaded for another version."""
    await bed.worker(version="v2")
    old = AdapterSpec("old", "/old", version="v1")
    bed.catalog(old, versions=(VersionShare("v1"),))
    waiting = asyncio.create_task(refused(bed.cluster.stub.Chat(chat(model="sim:old"), timeout=20)))
    await until(lambda: bed.cluster.gateway.scheduler.queues.waiting("sim")[0] == 1, "it waits")
    bed.catalog(old, versions=(VersionShare("v2"),))
    for answer in (await waiting, await refused(bed.cluster.stub.Chat(chat(model="sim:old"), timeout=20))):
        assert (answer.reason, "belongs to version v1" in answer.message) == ("ADAPTER_INVALID", True)
    bed.catalog(dataclasses.replace(old, version="v2"), versions=(VersionShare("v2"),))
    await bed.until_ready(1, "old")
    assert await bed.text("sim:old")


async def test_an_unloaded_adapter_is_gone_for_new_calls_only(bed: Bed) -> None:
    """A new call for a removed adapter is refused as unknown. A stream that already runs ends normally."""
    await bed.worker(decode_ms=5)
    bed.catalog(A)
    await bed.until_ready(1)
    stream = bed.cluster.stub.StreamChat(chat(model="sim:a", max_tokens=100, ignore_eos=True))
    chunks = [await read(stream)]
    bed.catalog()
    assert (await refused(bed.cluster.stub.Chat(chat(model="sim:a")))).reason == "MODEL_NOT_FOUND"
    chunks += await rest_of(stream)
    assert chunks[-1].usage.completion_tokens == 100


async def test_a_call_uses_the_files_that_count(bed: Bed) -> None:
    """While an adapter's files are replaced, no call fails. A waiting call uses the files that are valid when it
    starts."""
    await bed.worker()
    bed.catalog(A)
    await bed.until_ready(1)
    before = await bed.text("sim:a")
    bed.files.may_fetch.clear()
    bed.catalog(dataclasses.replace(A, source="/new"))
    calls = [asyncio.create_task(bed.text("sim:a")) for _ in range(8)]
    await until(lambda: bed.view().ready == 0, "the old files are gone")
    bed.files.may_fetch.set()
    await bed.until_ready(1)
    after = await bed.text("sim:a")
    assert after != before
    assert set(await asyncio.gather(*calls)) <= {before, after}


async def test_a_stream_resumes_only_where_its_adapter_is(bed: Bed) -> None:
    """A stream that loses its worker resumes on a worker with the same adapter, and has the same text as without the
    loss."""
    bed.catalog(A)
    first = await bed.worker(decode_ms=5)
    await bed.until_ready(1)
    request = chat(model="sim:a", max_tokens=60, ignore_eos=True)
    undisturbed = text_of(await rest_of(bed.cluster.stub.StreamChat(request)))
    stream = bed.cluster.stub.StreamChat(request)
    chunks = [await read(stream)]
    await bed.worker(max_loras=0, max_cpu_loras=0)
    await bed.worker()
    await bed.until_ready(2)
    await first.stop()
    chunks += await rest_of(stream)
    assert (text_of(chunks), chunks[-1].usage.resumed) == (undisturbed, 1)


async def test_a_stream_resumes_at_another_gateway_with_its_files(
    tmp_path: Path, checkpoint: Path, bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stream with an adapter is resumed at another gateway with the same text. If the adapter's files were replaced
    before the resume, the resume is refused."""
    monkeypatch.setenv("HEADRACE_CACHE_DIR", str(tmp_path / "cache"))
    one, two = tmp_path / "a", tmp_path / "b"
    async with running_bed(one, checkpoint, bundle) as bed, running_bed(two, checkpoint, bundle) as other:
        gateways = [each.cluster.gateway.endpoints["link"] for each in (bed, other)]
        worker = await bed.worker(gateways=gateways, decode_ms=3)
        other.cluster.workers.append(worker)
        await until(lambda: other.cluster.linked(worker.identity.worker_id), "it is linked to both")
        for each in (bed, other):
            each.catalog(A)
        await bed.until_ready(1)
        await other.until_ready(1)
        request = chat(model="alias:a", max_tokens=80, ignore_eos=True, resumable=True)
        undisturbed = text_of(await rest_of(bed.cluster.stub.StreamChat(request)))

        async def cut() -> list[Any]:
            stream = bed.cluster.stub.StreamChat(request)
            chunks = [await asyncio.wait_for(read(stream), 10) for _ in range(20)]
            stream.cancel()
            return chunks

        chunks = await cut()
        rest = await rest_of(other.cluster.stub.Resume(resume(request, chunks)))
        assert text_of([*chunks, *(one.chat for one in rest)]) == undisturbed
        chunks = await cut()
        for each in (bed, other):
            each.catalog(dataclasses.replace(A, source="/new"))
        await until(lambda: other.cluster.gateway.directory.models[0].adapters.digest("a") == digest_of("/new"), "new")
        answer = await refused(other.cluster.stub.Resume(resume(request, chunks)))
        assert (answer.reason, "adapter a has been replaced" in answer.message) == ("RESUME_UNSUPPORTED", True)


async def test_adapters_are_private_and_accounted_by_name(tmp_path: Path, checkpoint: Path, bundle: Bundle) -> None:
    """In every API, a private adapter can be called and listed only by its tenants. Calls of the adapter are recorded
    under the adapter's name."""
    async with keyed_cluster(tmp_path) as keyed:
        bed = Bed(keyed.cluster, checkpoint, bundle)
        bed.catalog(dataclasses.replace(A, tenants=("acme",)), B)
        await bed.worker()
        await bed.until_ready(1)
        await bed.until_ready(1, "b")
        acme = await keyed.key("acme", models=["*"])
        rival = await keyed.key("rival", models=["sim"])
        only = await keyed.key("only", models=["sim:b"])
        listed = {}
        for tenant, key in (("acme", acme), ("rival", rival), ("only", only)):
            models = await keyed.cluster.stub.ListModels(pb.ListModelsRequest(), metadata=bearer(key))
            listed[tenant] = [model.name for model in models.models]
            cards = (await keyed.fetch("/v1/models", key=key)).json["data"]
            assert [card["id"] for card in cards] == listed[tenant]
        assert listed == {"acme": ["sim", "sim:a", "sim:b"], "rival": ["sim", "sim:b"], "only": ["sim:b"]}

        async def answer(model: str, key: str) -> str:
            call = keyed.cluster.stub.Chat(chat(model=model), metadata=bearer(key), timeout=20)
            try:
                return str((await call).model)
            except grpc.aio.AioRpcError:
                return (await refused(call)).reason

        assert await answer("sim:a", acme) == "sim:a"
        assert await answer("sim:a", rival) == "MODEL_NOT_FOUND"
        assert await answer("sim:b", only) == "sim:b"
        assert await answer("sim", only) == "MODEL_NOT_FOUND"

        async def used() -> set[tuple[str, str]]:
            rows = await asyncio.to_thread(keyed.ledger.usage.query, UsageQuery(group_by=("tenant", "adapter")))
            return {(row["tenant"], row["adapter"]) for row in rows}

        await eventually(lambda: _equal(used, {("acme", "a"), ("only", "b")}), "the usage is recorded")


async def _equal(read_value: Any, wanted: object) -> bool:
    return bool(await read_value() == wanted)


async def test_a_model_at_zero_starts_for_a_call_of_its_adapter(bed: Bed) -> None:
    """A call for an adapter starts a model without workers: it waits, and counts as demand for the model. When a worker
    joins, the call waits until the worker has loaded the adapter."""
    bed.catalog(A, bundle_digest=bed._bundle.digest, max_model_len=2048)
    seed = await bed.worker()
    await bed.text("sim")  # the gateway has the tokenizer now
    await seed.stop()
    await until(lambda: not bed.cluster.gateway.hub.links, "it has no worker")
    call = asyncio.create_task(bed.text("sim:a"))
    await until(lambda: bed.cluster.gateway.dispatch.demand.current()[0].waiting == 1, "it counts as demand")
    await bed.worker(wait=False)
    assert await call


async def test_a_full_adapter_memory_is_no_failure(tmp_path: Path, checkpoint: Path, bundle: Bundle) -> None:
    """A call whose adapter finds no place in a worker's memory waits until a place is free, also if one failure of a
    worker ends a call."""
    text = LOOPBACK.replace("drain_timeout_s: 0", "drain_timeout_s: 0\n  resume: {max_attempts: 1}")
    async with running_bed(tmp_path, checkpoint, bundle, text) as bed:
        worker = await bed.worker(decode_ms=5, max_loras=1, max_cpu_loras=1)
        worker.end._adapters.loads._hold_s = 0.05
        bed.catalog(A, B)
        await bed.until_ready(1, "a")
        await bed.until_ready(1, "b")
        stream = bed.cluster.stub.StreamChat(chat(model="sim:a", max_tokens=400, ignore_eos=True))
        await read(stream)
        call = asyncio.create_task(bed.text("sim:b"))
        await until(lambda: bed.view("b").ready == 0, "the worker has refused the call")
        assert not call.done()
        stream.cancel()
        assert await call


async def test_a_report_of_failure_before_the_refusal_ends_the_call(bed: Bed) -> None:
    """A call whose adapter has failed on all workers ends with the reason, also if the worker's report precedes its
    refusal of the call."""
    worker = await bed.worker(decode_ms=5, max_loras=1, max_cpu_loras=1)
    worker.end._adapters.loads._hold_s = 60.0
    bed.catalog(A, B)
    await bed.until_ready(1, "a")
    await bed.until_ready(1, "b")
    stream = bed.cluster.stub.StreamChat(chat(model="sim:a", max_tokens=400, ignore_eos=True))
    await read(stream)
    call = asyncio.create_task(refused(bed.cluster.stub.Chat(chat(model="sim:b", max_tokens=1), timeout=20)))
    (link,) = bed.cluster.gateway.hub.links
    await until(lambda: link.running == 2, "the call waits in the worker")
    status = AdapterStatus("b", digest_of("/b"), AdapterState.FAILED, "odd weights")
    report = adapter_report_to_pb([link.adapters.statuses["a"], status])
    link.apply(link_pb.WorkerTurn(adapters=report, refused=[link_pb.Refused(slot=2, reason="ADAPTER_INVALID")]))
    answer = await call
    assert (answer.reason, "odd weights" in answer.message) == ("ADAPTER_INVALID", True)
    stream.cancel()
