"""The number of gateways in the manifest of an autoscaled release, for a cluster that Helm can read."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support import kubernetes_reads
from tests.support.kubernetes_reads import ACCOUNT

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def chart(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with a copy of the chart that renders only the gateways."""
    return kubernetes_reads.chart_of(tmp_path_factory.mktemp("charts"), "gateway.yaml")


def running(kind: str, replicas: int) -> dict[str, Any]:
    """Return the gateways of a release that runs."""
    live = {"apiVersion": "apps/v1", "kind": kind, "metadata": {"name": "headrace-gateway"}}
    return {f"{kind.lower()}s/headrace-gateway": {**live, "spec": {"replicas": replicas}}}


@pytest.mark.parametrize("kind", ["StatefulSet", "Deployment"])
@pytest.mark.parametrize(
    ("scaling", "live", "replicas"), [("keda", 7, 7), ("hpa", 0, 0), ("hpa", None, 3), ("none", 7, 2)]
)
def test_an_upgrade_keeps_the_number_that_runs(
    chart: Path, kind: str, scaling: str, live: int | None, replicas: int
) -> None:
    """With an autoscaler, an upgrade renders the number of gateways that run, and a first install the least number.

    Helm would otherwise remove the number of the manifest before, and Kubernetes would replace it by 1.
    """
    objects: Mapping[str, Any] = {**ACCOUNT, **(running(kind, live) if live is not None else {})}
    values = f"gateway.kind={kind},gateway.autoscaling.kind={scaling},gateway.autoscaling.minReplicas=3"
    arguments = ("--is-upgrade",) if live is not None else ()
    text = kubernetes_reads.rendered(chart, objects, "--set", values, *arguments)
    (workload,) = (item for item in yaml.safe_load_all(text) if item and item["kind"] == kind)
    assert workload["spec"]["replicas"] == replicas
