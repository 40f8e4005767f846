"""The commands `models` and `workers`. If the address of the admin API is known, they also show replicas and nodes."""

from __future__ import annotations

import json
from collections.abc import Callable

from hypothesis import given
from hypothesis import strategies as st
from typer.testing import Result

from cluster.admin.v1 import admin_pb2
from cluster.cli.commands.operate.model_list import nodes_by_model
from cluster.v1 import inference_pb2
from tests.support.scripted_gateway import ScriptedGateway

Run = Callable[..., Result]


def test_replicas_and_nodes_are_shown(run: Run, gateway: ScriptedGateway) -> None:
    """Given the admin address, `models` shows the replicas and nodes of each model, and `workers` shows pods and GPUs.

    Without the address, `models` shows only what callers may see. If the admin API does not answer, a note is added.
    """
    gateway.script.models = [
        inference_pb2.Model(name=name, state=inference_pb2.Model.STATE_READY) for name in ("tiny", "private")
    ]
    gateway.script.entries = [admin_pb2.CatalogEntry(name="tiny", replicas_desired=3, ready_workers=2)]
    gateway.script.workers = [
        admin_pb2.Worker(worker_id=f"w{at}", model="tiny", host=host, pod=f"p{at}", gpu="H100")
        for at, host in enumerate(("node-b", "node-a", "node-b"))
    ]
    at = ("--endpoint", gateway.endpoint)
    shown = run("models", *at, "--admin", gateway.endpoint).stdout
    assert "2 of 3" in shown
    assert "node-a, node-b (2)" in shown
    rows = {
        row["name"]: row for row in json.loads(run("models", "list", "--json", *at, "--admin", gateway.endpoint).stdout)
    }
    assert rows["tiny"]["nodes"] == {"node-a": 1, "node-b": 2}
    assert "nodes" not in rows["private"]
    for callers in (run("models", *at), run("models", *at, "--admin", "127.0.0.1:1")):
        assert callers.exit_code == 0
        assert "replicas" not in callers.stdout
        assert "tiny" in callers.stdout
    assert "replicas are not shown" in callers.stderr
    workers = run("workers", "--admin", gateway.endpoint).stdout
    for part in ("node-a", "p2", "H100"):
        assert part in workers


@given(st.lists(st.tuples(st.sampled_from("ab"), st.sampled_from(["n1", "n2", ""]))))
def test_each_worker_is_counted_once(places: list[tuple[str, str]]) -> None:
    """The counts of a model's nodes add up to its number of workers, and the nodes are sorted."""
    counts = nodes_by_model(places)
    assert {model: sum(nodes.values()) for model, nodes in counts.items()} == {
        model: sum(1 for other, _ in places if other == model) for model, _ in places
    }
    assert all(list(nodes) == sorted(nodes) for nodes in counts.values())
