"""The command models with a scripted gateway: replicas and nodes where the admin address is known."""

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
    """With an admin address, `models` shows each model's replicas and nodes, and `workers` shows pods and GPUs. Without
    one, or if the admin API does not answer, it shows what callers may know, with a note in the latter case."""
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
    """The counts of all nodes of a model add up to its workers, and nodes are in order."""
    counts = nodes_by_model(places)
    assert {model: sum(nodes.values()) for model, nodes in counts.items()} == {
        model: sum(1 for other, _ in places if other == model) for model, _ in places
    }
    assert all(list(nodes) == sorted(nodes) for nodes in counts.values())
