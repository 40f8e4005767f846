"""Versions of a model at a gateway: canaries, removed versions, and fallback models."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from cluster.api.types import CatalogEntry, ModelState, VersionShare, VersionTally
from cluster.policy.routing.version_split import choose_version
from cluster.wire.bundle import Bundle
from cluster.wire.dial import read
from tests.support.calls import chat, refused, rest_of
from tests.support.cluster import TestCluster, Worker, sim_engine, until

pytestmark = pytest.mark.slow

TWO = (VersionShare("v1", 0.75), VersionShare("v2", 0.25, ttft_ratio=1.2))


def entry(**fields: Any) -> CatalogEntry:
    """Return the model's catalog entry as a controller would send it."""
    return dataclasses.replace(CatalogEntry("sim", state=ModelState.READY), **fields)


def apply_catalog(cluster: TestCluster, *entries: CatalogEntry) -> None:
    """Apply a new catalog at the gateway."""
    cluster.gateway.worker_events.apply_catalog(entries)


async def ask(cluster: TestCluster, request_id: str, **fields: Any) -> str:
    """Make one call. Returns the id of the worker that ran the call."""
    before = {worker.identity.worker_id: worker.engine.load().steps for worker in cluster.workers}
    fields = {"max_tokens": 4, "ignore_eos": True, **fields}
    await cluster.stub.Chat(chat(**fields), metadata=(("x-request-id", request_id),))
    (ran,) = [w.identity.worker_id for w in cluster.workers if w.engine.load().steps > before[w.identity.worker_id]]
    return ran


def of_version(version: str, shares: Sequence[VersionShare]) -> str:
    """Return a request id that is assigned to this version."""
    pairs = [(one.version, one.weight) for one in shares]
    return next(name for name in map("r{}".format, range(1000)) if choose_version(name, pairs) == version)


async def two_workers(
    cluster: TestCluster, checkpoint: Path, bundle: Bundle, **engine: object
) -> tuple[Worker, Worker]:
    """Start one worker of each version."""
    first = await cluster.add_worker(
        sim_engine(checkpoint, decode_ms=1), bundle, version="v1", generation="g1", weight_digest="one"
    )
    second = await cluster.add_worker(
        sim_engine(checkpoint, **{"decode_ms": 1, **engine}), bundle, version="v2", generation="g2", weight_digest="two"
    )
    return first, second


async def test_calls_are_shared_out_by_weight_and_stay_so(
    cluster: TestCluster, checkpoint: Path, bundle: Bundle
) -> None:
    """The same request id always gets the same version. Calls are divided between the versions by weight, and all are
    counted for the controller."""
    first, second = await two_workers(cluster, checkpoint, bundle)
    apply_catalog(cluster, entry(versions=TWO))
    went = [await ask(cluster, f"r{i}") for i in range(40)]
    assert went == [await ask(cluster, f"r{i}") for i in range(40)]
    assert went.count(first.identity.worker_id) > went.count(second.identity.worker_id) > 0
    tallies = {tally.version: tally for tally in cluster.gateway.scheduler.canaries.tallies()}
    assert tallies["v1"] == VersionTally("sim", "v1", "g1", calls=2 * went.count(first.identity.worker_id))
    assert tallies["v2"].calls == 2 * went.count(second.identity.worker_id)
    assert 0 < tallies["v2"].pairs <= tallies["v2"].calls
    apply_catalog(cluster, entry(versions=(TWO[0], dataclasses.replace(TWO[1], revision="another"))))
    assert not cluster.gateway.scheduler.canaries.tallies(), "another trial begins at nothing"


async def test_a_slow_first_token_and_a_dead_worker_count_against_a_trial(
    cluster: TestCluster, checkpoint: Path, bundle: Bundle
) -> None:
    """A slower first token counts against the canary, and so does a lost worker, even if the worker's call is
    resumed."""
    _, second = await two_workers(cluster, checkpoint, bundle, prefill_tokens_per_s=300)
    even = (VersionShare("v1", 0.5), VersionShare("v2", 0.5, ttft_ratio=1.2))
    apply_catalog(cluster, entry(versions=even))
    for i in range(16):
        await ask(cluster, f"r{i}")
    (slow,) = [tally for tally in cluster.gateway.scheduler.canaries.tallies() if tally.version == "v2"]
    assert slow.pairs == slow.slower > 0
    mine = of_version("v2", even)
    lost = cluster.stub.StreamChat(chat(max_tokens=50, ignore_eos=True), metadata=(("x-request-id", mine),))
    await until(lambda: second.engine.load().running > 0, "it runs at the second")
    await second.stop()
    assert sum(len(c.choices) for c in await rest_of(lost)) > 0
    await cluster.until_idle()
    (slow,) = [tally for tally in cluster.gateway.scheduler.canaries.tallies() if tally.version == "v2"]
    assert slow.errors == 1


async def test_a_version_without_room_or_workers_is_stood_in_for(
    cluster: TestCluster, checkpoint: Path, bundle: Bundle
) -> None:
    """If a version has no capacity or no workers, its calls go to the other version, which has the same tokenizer."""
    first, second = await two_workers(cluster, checkpoint, bundle, max_num_seqs=1)
    apply_catalog(cluster, entry(versions=TWO))
    mine = of_version("v2", TWO)
    assert await ask(cluster, mine) == second.identity.worker_id
    full = cluster.stub.StreamChat(chat(max_tokens=2000, ignore_eos=True), metadata=(("x-request-id", mine),))
    await read(full)
    steps = first.engine.load().steps
    await cluster.stub.Chat(chat(max_tokens=4, ignore_eos=True), metadata=(("x-request-id", mine),))
    assert first.engine.load().steps > steps
    full.cancel()
    await cluster.until_idle()
    await second.stop()
    assert await ask(cluster, mine) == first.identity.worker_id


async def test_several_outputs_of_a_call_come_from_one_version(
    cluster: TestCluster, checkpoint: Path, bundle: Bundle
) -> None:
    """If a call's version has capacity for only some of the call's sequences, the other sequences wait for the same
    version."""
    await two_workers(cluster, checkpoint, bundle, max_num_seqs=2)
    apply_catalog(cluster, entry(versions=TWO))
    for i in range(12):
        await ask(cluster, f"n{i}", n=4)


async def test_several_outputs_of_a_call_come_from_the_same_weights(
    cluster: TestCluster, checkpoint: Path, bundle: Bundle
) -> None:
    """While replicas with other weights replace those of a version that keeps its name, all outputs of a call come from
    workers with the weights of the first."""
    for digest in ("one", "two"):
        engine = sim_engine(checkpoint, decode_ms=1, max_num_seqs=2)
        await cluster.add_worker(engine, bundle, version="v1", weight_digest=digest)
    apply_catalog(cluster, entry(versions=(VersionShare("v1"),)))
    for i in range(12):
        await ask(cluster, f"n{i}", n=4)


async def test_a_prompt_runs_on_a_worker_with_its_tokenizer(
    cluster: TestCluster, checkpoint: Path, bundle: Bundle
) -> None:
    """While replicas with another tokenizer replace those of a version that keeps its name, each call runs on a worker
    with the tokenizer that has encoded its prompt."""
    name = "tokenizer_config.json"
    other = Bundle({**bundle.files, name: bundle.files[name] + b"\n"})
    digests = {}
    for of_worker in (bundle, other):
        worker = await cluster.add_worker(sim_engine(checkpoint, decode_ms=1), of_worker, version="v1")
        digests[worker.identity.worker_id] = of_worker.digest
    (model,) = cluster.gateway.directory.models
    ran = [digests[await ask(cluster, f"r{i}")] for i in range(16)]
    assert ran == [model.versions.choose(f"r{i}").bundle_digest for i in range(16)]
    assert set(ran) == set(digests.values())


async def test_what_is_replaced_gets_no_new_call_and_keeps_what_it_has(
    cluster: TestCluster, checkpoint: Path, bundle: Bundle
) -> None:
    """A retired deployment of a model finishes its streams and gets no new ones. The workers of the new deployment keep
    the model READY."""
    first, second = await two_workers(cluster, checkpoint, bundle)
    apply_catalog(cluster, entry())
    streams = [cluster.stub.StreamChat(chat(max_tokens=300, ignore_eos=True)) for _ in range(8)]
    for stream in streams:
        await read(stream)
    assert first.engine.load().running
    apply_catalog(cluster, entry(retired=("g1",)))
    for i in range(8):
        assert await ask(cluster, f"r{i}") == second.identity.worker_id if not first.engine.load().running else True
    for stream in streams:
        assert (await rest_of(stream))[-1].choices[0].finish_reason == "length"
    assert {await ask(cluster, f"q{i}") for i in range(8)} == {second.identity.worker_id}
    apply_catalog(cluster, entry(retired=("g1", "g2")))
    known = cluster.gateway.directory.find("sim")
    assert known is not None
    assert not known.served


async def test_a_stream_of_what_was_replaced_does_not_wait_for_its_like(
    cluster: TestCluster, checkpoint: Path, bundle: Bundle
) -> None:
    """A model's workers are replaced by a new generation, and a stream loses its worker of the old generation. The
    stream resumes on a compatible worker. If there is none, the stream fails at once when the new generation serves.
    The stream waits while the new generation does not serve yet, or if the new generation was rolled back."""

    async def begun_at(worker: Worker) -> Any:
        stream = cluster.stub.StreamChat(chat(max_tokens=3000, ignore_eos=True))
        await read(stream)
        await until(lambda: worker.engine.load().running == 1, "it runs there")
        return stream

    async def waits() -> None:
        (running,) = cluster.gateway.service.calls
        await until(lambda: cluster.gateway.scheduler.queues.is_resuming(running), "it waits")

    first, second = await two_workers(cluster, checkpoint, bundle)
    twin = await cluster.add_worker(sim_engine(checkpoint, decode_ms=1), bundle, generation="g3", weight_digest="one")
    apply_catalog(cluster, entry(retired=("g2", "g3")))
    stream = await begun_at(first)
    apply_catalog(cluster, entry(retired=("g1", "g3")))
    await first.stop()
    await until(lambda: twin.engine.load().running > 0, "the stream has resumed on the compatible worker")
    await twin.stop()
    answer = await refused(rest_of(stream))
    assert (answer.reason, "cannot continue" in answer.message) == ("WORKER_LOST", True)
    assert second.engine.load().running == 0

    stream = await begun_at(second)
    apply_catalog(cluster, entry(retired=("g2",)))
    await second.stop()
    await waits()
    fourth = await cluster.add_worker(
        sim_engine(checkpoint, decode_ms=1), bundle, generation="g4", weight_digest="three"
    )
    assert (await refused(rest_of(stream))).reason == "WORKER_LOST"

    stream = await begun_at(fourth)
    apply_catalog(cluster, entry(retired=("g4",)))
    apply_catalog(cluster, entry())
    await cluster.add_worker(sim_engine(checkpoint, decode_ms=1), bundle, generation="g5", weight_digest="four")
    await fourth.stop()
    await waits()
    stream.cancel()
    await cluster.until_idle()


async def test_a_quarantined_version_is_left(cluster: TestCluster, checkpoint: Path, bundle: Bundle) -> None:
    """A quarantined version gets no new calls, and its streams move to workers with the same weights. If all versions
    are quarantined, calls are refused."""
    first, second = await two_workers(cluster, checkpoint, bundle)
    twin = await cluster.add_worker(
        sim_engine(checkpoint, decode_ms=1), bundle, version="v1", generation="g3", weight_digest="two"
    )
    apply_catalog(cluster, entry(versions=(VersionShare("v1", 0.0), VersionShare("v2", 1.0))))
    stream = cluster.stub.StreamChat(chat(max_tokens=3000, ignore_eos=True))
    await read(stream)
    await until(lambda: second.engine.load().running > 0, "it runs at the second")
    apply_catalog(cluster, entry(versions=(VersionShare("v1", 0.0), VersionShare("v2", 1.0, quarantined=True))))
    await until(lambda: twin.engine.load().running > 0, "it has moved to its twin")
    await until(lambda: second.engine.load().running == 0, "it has left the second")
    steps = second.engine.load().steps
    await cluster.stub.Chat(chat(max_tokens=4, ignore_eos=True))
    assert second.engine.load().steps <= steps + 1, "one may have been under way; a call takes four"
    stream.cancel()
    apply_catalog(cluster, entry(versions=(VersionShare("v1", 1.0, quarantined=True),)))
    answer = await refused(cluster.stub.Chat(chat()))
    assert (answer.reason, "quarantined" in answer.message) == ("NO_WORKER", True)
    assert first.engine.load().running == 0


async def test_a_model_that_leaves_serves_what_has_come(cluster: TestCluster, checkpoint: Path, bundle: Bundle) -> None:
    """The streams and waiting calls of a model that is being removed are served to their end, and new calls are
    refused."""
    await cluster.add_worker(sim_engine(checkpoint, decode_ms=1, max_num_seqs=1), bundle)
    apply_catalog(cluster, entry())
    stream = cluster.stub.StreamChat(chat(max_tokens=200, ignore_eos=True))
    await read(stream)
    waits = cluster.stub.Chat(chat())
    await until(lambda: cluster.gateway.scheduler.queues.waiting("sim")[0] == 1, "it waits")
    apply_catalog(cluster, entry(state=ModelState.DRAINING))
    answer = await refused(cluster.stub.Chat(chat()))
    assert (answer.reason, answer.message) == ("MODEL_NOT_FOUND", "model sim is being removed from this cluster")
    assert (await rest_of(stream))[-1].choices[0].finish_reason == "length"
    assert (await waits).choices[0].finish_reason


async def test_fallback_only_without_a_worker_and_told(cluster: TestCluster, checkpoint: Path, bundle: Bundle) -> None:
    """The first fallback model with a worker answers a call. The answer and a header name that model. The call counts
    as demand for the requested model."""
    apply_catalog(
        cluster,
        CatalogEntry("big", state=ModelState.LOADING, fallback=("away", "sim"), bundle_digest=bundle.digest),
        CatalogEntry("away", state=ModelState.LOADING),
        entry(),
    )
    await cluster.add_worker(sim_engine(checkpoint, decode_ms=1), bundle)
    call = cluster.stub.Chat(chat(model="big"))
    assert (await call).model == "sim"
    assert dict(await call.initial_metadata())["x-headrace-model"] == "sim"
    body = {"model": "big", "max_tokens": 3, "messages": [{"role": "user", "content": "Hi"}]}
    request = urllib.request.Request(
        f"http://{cluster.gateway.endpoints['http']}/v1/chat/completions",
        json.dumps(body).encode(),
        {"content-type": "application/json"},
    )
    answer = await in_thread(request)
    assert (answer[0]["model"], answer[1]) == ("sim", "sim")
    demand = {one.model: one.arrived for one in cluster.gateway.dispatch.demand.current()}
    assert demand == {"away": 0, "big": 2, "sim": 2}
    await cluster.add_worker(sim_engine(checkpoint, decode_ms=1), bundle, model="big")
    call = cluster.stub.Chat(chat(model="big"))
    assert (await call).model == "big"
    assert "x-headrace-model" not in dict(await call.initial_metadata())


async def in_thread(request: urllib.request.Request) -> tuple[Any, str | None]:
    """Return the JSON of an HTTP answer, and the model that is named in the answer's header."""

    def send() -> tuple[Any, str | None]:
        with urllib.request.urlopen(request, timeout=60) as answer:  # noqa: S310 - of a loopback port
            return json.load(answer), answer.headers.get("x-headrace-model")

    return await asyncio.to_thread(send)


@pytest.mark.parametrize(("digest", "taken"), [("one", True), ("two", False)])
async def test_each_version_has_its_own_pin(
    cluster: TestCluster, checkpoint: Path, bundle: Bundle, digest: str, taken: bool
) -> None:
    """A worker with the weights of one version is refused as a worker of the other version."""
    pinned = VersionShare("v1", weight_digests=("one",), weights_pinned=True), VersionShare("v2", 0.0)
    apply_catalog(cluster, entry(versions=pinned))
    engine = sim_engine(checkpoint, decode_ms=1)
    worker = await cluster.add_worker(engine, bundle, version="v1", weight_digest=digest, wait=False)
    if taken:
        await until(lambda: cluster.linked(worker.identity.worker_id), "it is let in")
    assert bool(cluster.gateway.directory.refusal_of(worker.identity)) is not taken
