"""Tests of scaling in the controller's process: the scaler's inputs, the stored requests, the metrics."""

from __future__ import annotations

from pathlib import Path

from cluster.api.types import DrainState, ModelSpec
from cluster.config.document import parse
from cluster.controller import scaling
from cluster.controller.links import FleetWorker
from cluster.observe.metrics import Metrics
from cluster.policy.catalog.reconcile import Observed
from cluster.policy.scaling.inputs import OperatorRequest, RayReplicas
from cluster.policy.scaling.scaler import Scaler


def test_what_ray_has_is_summed_by_model() -> None:
    """A model's replicas are the sum over its applications, without applications that are being deleted."""
    apps = [
        Observed("m", "d1", 2, running=1, placed=1),
        Observed("m", "d2", 1, running=1, leaving=1),
        Observed("m", "d3", 5, running=5, deleting=True),
        Observed("n", "d4", 0),
    ]
    assert scaling.on_ray(apps) == {("m", ""): RayReplicas(3, 2, 1, 1), ("n", ""): RayReplicas()}


def test_workers_that_drain_do_not_serve() -> None:
    """A draining worker does not count as serving. If a worker has not reported its engine's limits, `limits` is
    None."""
    draining = FleetWorker(
        "w", "i", "m", drain_state=DrainState.DRAINING, max_num_seqs=4, max_num_batched_tokens=8, kv_tokens=9
    )
    seen, plain = scaling.workers_of([draining, FleetWorker("v", "j", "m")])
    assert (seen.serves, seen.limits is not None and seen.limits.kv_tokens) == (False, 9)
    assert (plain.serves, plain.limits) == (True, None)


def test_what_was_asked_is_kept_whole(tmp_path: Path) -> None:
    """Stored scaling requests are read back. If the file is missing or damaged, there are no requests."""
    file = scaling.OperatorRequestFile(tmp_path / "scaling.json")
    assert file.read() == OperatorRequest()
    asked = OperatorRequest({"m": 3}, frozenset({"n"}), True)
    file.keep(asked)
    assert file.read() == asked
    for damaged in ("", "[]", '{"manual": 1}'):
        (tmp_path / "scaling.json").write_text(damaged)
        assert file.read() == OperatorRequest()


def test_counters_grow_by_what_has_come() -> None:
    """The counters of GPU-seconds and scaling decisions grow only after a new pass, however often they are updated."""
    metrics, scaler = Metrics("c"), Scaler()
    counters = scaling.Counters(metrics)
    spec = ModelSpec("m", "/m", min_replicas=2, max_replicas=2)
    for now in (0.0, 10.0, 20.0):
        scaler.run_pass([spec], {("m", ""): RayReplicas(2, 2)}, [], now, now)
        counters.count(scaler)
        counters.count(scaler)
    values = {s.name: s.value for metric in metrics.collect() for s in metric.samples if s.labels.get("model") == "m"}
    assert values["headrace_gpu_seconds_total"] == 40.0
    assert values["headrace_scaling_decisions_total"] == 3


def test_the_section_of_the_file() -> None:
    """The sections `scaling` and `slo` are read from the file. Without a section `scaling`, no model is frozen."""
    head = "api_version: headrace/v1\nname: c\n"
    head += "models: [{name: m, source: s, slo: {ttft_s: 1, itl_s: 0.05, target: 0.9}}]\n"
    config = parse(head + "scaling: {gpu_budget: {H100: 8}, cold_start_s: 90, frozen: true}\n")
    settings = scaling.settings_of(config)
    assert (dict(settings.gpu_budget), settings.cold_start_s, settings.frozen) == ({"H100": 8}, 90.0, True)
    spec = config.models[0].spec()
    assert (spec.slo_ttft_s, spec.slo_itl_s, spec.slo_target) == (1.0, 0.05, 0.9)
    assert not scaling.settings_of(parse(head)).frozen
