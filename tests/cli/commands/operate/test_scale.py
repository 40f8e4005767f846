"""The commands scale, freeze, unfreeze and explain scaling work with a scripted admin API over gRPC."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
from typer.testing import Result

from cluster.admin.v1 import scaling_pb2 as pb
from tests.support.scripted_gateway import ScriptedGateway

Run = Callable[..., Result]


@pytest.mark.slow
def test_scale_to_a_number_and_back(run: Run, gateway: ScriptedGateway) -> None:
    """`scale` sends a number of replicas, zero included, or `auto`. Any other value is bad usage and is not sent."""
    at = ("--admin", gateway.endpoint)
    assert "manual" in run("scale", "tiny", "3", "--reason", "a fair", *at).stdout
    assert run("scale", "tiny", "0", *at).exit_code == 0
    (model,) = json.loads(run("scale", "tiny", "auto", "--json", *at).stdout)
    assert (model["name"], model["by"]) == ("tiny", "demand")
    for bad in ("-1", "two", "1.5", str(1 << 31)):
        assert run("scale", "tiny", *at, "--", bad).exit_code == 2
    three, zero, auto = gateway.script.requests
    assert (three.replicas, three.reason) == (3, "a fair")
    assert zero.WhichOneof("to") == "replicas"
    assert (auto.WhichOneof("to"), auto.auto) == ("auto", True)


def test_freeze_one_or_all(run: Run, gateway: ScriptedGateway) -> None:
    """`freeze MODEL` freezes the scaling of one model. Without a model, `freeze` and `unfreeze` apply to all models."""
    at = ("--admin", gateway.endpoint)
    assert "frozen" in run("freeze", "tiny", *at).stdout
    assert "all" in run("freeze", *at).stdout
    assert "demand" in run("unfreeze", *at).stdout
    assert [request.name for request in gateway.script.requests] == ["tiny", "", ""]


def test_explain_scaling(run: Run, gateway: ScriptedGateway) -> None:
    """`explain scaling` shows a model's scaling state and its scaling decisions, as text and as JSON."""
    at = ("--admin", gateway.endpoint)
    decision = pb.ScalingDecision(
        at_s=1e9, replicas_before=1, replicas=3, action="up", why="forecast", numbers={"load": 2.5}, passes=1
    )
    model = pb.ModelScaling(name="tiny", running=1, starting=2, desired=3, max_replicas=4, by="demand", why="forecast")
    gateway.script.story = pb.ExplainScalingResponse(model=model, decisions=[decision], now={"load": 2.25})
    text = run("explain", "scaling", "tiny", *at).stdout
    for part in ("1 and 2 starting", "0 to 4", "1 to 3", "load 2.5", "load 2.25", "not known"):
        assert part in text
    answer = json.loads(run("explain", "scaling", "tiny", "--last", "5", "--json", *at).stdout)
    assert (answer["model"]["desired"], answer["now"], answer["decisions"][0]["numbers"]) == (
        3,
        {"load": 2.25},
        {"load": 2.5},
    )
    assert gateway.script.requests[-1].limit == 5
