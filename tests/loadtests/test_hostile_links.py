"""Hostile calls over all APIs: no link is lost, no stream of another caller is affected, and no
hostile call remains.
"""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from loadtests.hostile.generator import FIELDS, Generator
from loadtests.hostile.links import Attack, Volley
from loadtests.serving import ours
from tests.support.calls import complete
from tests.support.checkpoints import build_checkpoint
from tests.support.cluster import bundle_of, running_cluster, sim_engine

CALLS = 120


def test_the_generator_covers_every_field() -> None:
    """Every field is hostile in at least one call, and equal seeds give equal calls."""
    calls = list(Generator(5, "m").generate(400))
    assert {name for call in calls for name in call.fields} == set(FIELDS)
    assert [(call.message, call.body) for call in Generator(5, "m").generate(20)] == [
        (call.message, call.body) for call in calls[:20]
    ]
    assert any(b"\xed\xa0\x80" in call.message for call in calls)


@pytest.mark.slow
@pytest.mark.parametrize("places", [8, 1], ids=["unqueued", "queued"])
async def test_hostile_calls_touch_nobody(tmp_path: Path, places: int) -> None:
    """Hostile calls end no link and change no stream of another tenant. A surrogate in a queued call's regex once ended
    the link of its worker, and with the link all streams on that worker.
    """
    checkpoint = build_checkpoint("llama", tmp_path / "llama")
    async with running_cluster(tmp_path / "gateway") as cluster:
        engine = sim_engine(checkpoint, decode_ms=2, max_num_seqs=places)
        await cluster.add_worker(engine, bundle_of(checkpoint), model=ours.MODEL)
        request = complete(model=ours.MODEL, max_tokens=300, ignore_eos=True)
        alone = (await cluster.stub.Complete(request)).choices[0].text
        links = cluster.gateway.hub.links
        attack = Attack(cluster.gateway.endpoints["grpc"], cluster.gateway.endpoints["http"], "none")
        stream = asyncio.ensure_future(cluster.stub.Complete(request))
        try:
            await attack.run(Volley(places, CALLS, 16))
        finally:
            await attack.close()
        assert (await stream).choices[0].text == alone
        assert cluster.gateway.hub.links == links
        assert sum(attack.answers.values()) >= CALLS / 2
        await cluster.until_idle()
