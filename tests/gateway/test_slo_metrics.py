"""Tests of the metrics by which alerts and dashboards judge calls: whether calls meet the SLO of their model, and how a
canary compares with the stable version."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster.api.types import VersionShare
from cluster.wire.bundle import Bundle
from tests.gateway.scheduling.test_versions import apply_catalog, ask, entry, of_version, two_workers
from tests.gateway.test_seen import Samples, scrape
from tests.support.calls import chat, refused
from tests.support.cluster import TestCluster, sim_engine

NEVER = 1e-9
"""An objective in seconds that no call meets."""


def by(samples: Samples, name: str, *labels: str) -> dict[tuple[str, ...], float]:
    """Return the values of a metric by the values of these labels."""
    found = [(dict(pairs), value) for (metric, pairs), value in samples.items() if metric == f"headrace_{name}"]
    return {tuple(pairs[label] for label in labels): value for pairs, value in found}


@pytest.mark.parametrize(
    ("slo", "outcome"),
    [
        ({}, "met"),
        ({"slo_ttft_s": 3600.0, "slo_itl_s": 3600.0}, "met"),
        ({"slo_ttft_s": NEVER, "slo_itl_s": NEVER}, "late_first_token"),
        ({"slo_ttft_s": 3600.0, "slo_itl_s": NEVER}, "slow_tokens"),
    ],
)
async def test_answered_calls_are_judged_by_the_slo_of_their_model(
    cluster: TestCluster, checkpoint: Path, bundle: Bundle, slo: dict[str, float], outcome: str
) -> None:
    """`slo_calls_total` counts an answered call under the outcome `met`, or under the first objective that the call
    missed. The objectives of each model are exported too."""
    apply_catalog(cluster, entry(**slo))
    await cluster.add_worker(sim_engine(checkpoint, decode_ms=1), bundle)
    for _ in range(3):
        await cluster.stub.Chat(chat(max_tokens=5, ignore_eos=True))
    samples = await scrape(cluster)
    assert by(samples, "slo_calls_total", "outcome") == {(outcome,): 3}
    assert by(samples, "model_slo_ttft_seconds", "model") == ({("sim",): slo["slo_ttft_s"]} if slo else {})
    assert by(samples, "model_slo_itl_seconds", "model") == ({("sim",): slo["slo_itl_s"]} if slo else {})


async def test_calls_without_a_worker_fail_and_invalid_ones_do_not_count(cluster: TestCluster) -> None:
    """A call that gets no worker counts as failed. An invalid call does not count."""
    apply_catalog(cluster, entry(slo_ttft_s=3600.0))
    await refused(cluster.stub.Chat(chat(), timeout=0.2))
    await refused(cluster.stub.Chat(chat(temperature=9)))
    await refused(cluster.stub.Chat(chat(), timeout=0.2))
    samples = await scrape(cluster)
    assert by(samples, "slo_calls_total", "outcome") == {("failed",): 2}


async def test_versions_are_counted_while_a_canary_runs(cluster: TestCluster, checkpoint: Path, bundle: Bundle) -> None:
    """While a canary runs, calls are counted by version, and the canary's times to first token are compared with those
    of the stable version. The metrics have the number of workers of each version. Without a canary, no calls are
    counted by version."""
    await two_workers(cluster, checkpoint, bundle)
    apply_catalog(cluster, entry(versions=(VersionShare("v1", 1.0),)))
    await ask(cluster, "before")
    shares = (VersionShare("v1", 0.5), VersionShare("v2", 0.5, ttft_ratio=1e-9))
    apply_catalog(cluster, entry(versions=shares))
    for version in ("v1", "v2", "v1"):
        await ask(cluster, of_version(version, shares))
    samples = await scrape(cluster)
    assert by(samples, "canary_calls_total", "version", "outcome") == {("v1", "ok"): 2, ("v2", "ok"): 1}
    assert by(samples, "canary_compared_total", "version", "outcome") == {("v2", "slower"): 1}
    assert by(samples, "model_version_workers", "version") == {("v1",): 1, ("v2",): 1}
