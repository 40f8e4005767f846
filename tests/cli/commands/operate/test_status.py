"""Tests of the commands `status` and `workers` with a scripted admin API over gRPC."""

from __future__ import annotations

import json
import os
from collections.abc import Callable

from typer.testing import Result

from cluster.admin.v1 import admin_pb2
from cluster.cli.local.run_folder import ProcessId, RunFolder
from tests.support.scripted_gateway import ScriptedGateway

Run = Callable[..., Result]


def fill(gateway: ScriptedGateway) -> None:
    """Make the scripted gateway report one model and one worker."""
    gateway.script.entries = [
        admin_pb2.CatalogEntry(name="tiny", aliases=["default"], state="READY", replicas_desired=1, ready_workers=1)
    ]
    gateway.script.workers = [
        admin_pb2.Worker(
            worker_id="w1", model="tiny", state="READY", running=3, max_num_seqs=8, kv_usage=0.25, kv_tokens=9
        )
    ]


def test_status_json_has_endpoints_models_and_workers(run: Run, gateway: ScriptedGateway) -> None:
    """`status --json` prints every key, including keys with the value zero, and prints numbers as JSON numbers."""
    fill(gateway)
    status = json.loads(run("status", "--json", "--admin", gateway.endpoint).stdout)
    assert status["endpoints"]["admin"] == gateway.endpoint
    assert [(m["name"], m["state"], m["waiting"]) for m in status["models"]] == [("tiny", "READY", 0)]
    (worker,) = status["workers"]
    assert (worker["worker_id"], worker["running"], worker["waiting"], worker["kv_usage"]) == ("w1", 3, 0, 0.25)
    assert worker["kv_tokens"] == 9


def test_status_for_people(run: Run, gateway: ScriptedGateway) -> None:
    """`status` prints a table of models, and a table of workers with each worker's load."""
    fill(gateway)
    assert "sampling" not in run("status", "--admin", gateway.endpoint).stdout
    gateway.script.entries[0].default_sampling.update(top_p=0.9, max_tokens=64)
    text = run("status", "--admin", gateway.endpoint).stdout
    assert "max_tokens 64, top_p 0.9" in text
    assert "1 of 1" in text
    assert "3 of 8" in text
    assert "25%" in text
    assert "w1" in run("workers", "--admin", gateway.endpoint).stdout


def test_an_empty_cluster_says_so(run: Run, gateway: ScriptedGateway) -> None:
    """`status` reports in words that a cluster has no models and no workers."""
    text = run("status", "--admin", gateway.endpoint).stdout
    assert "no models" in text
    assert "no workers are linked" in text


def test_the_local_cluster_is_found_by_itself(run: Run, gateway: ScriptedGateway) -> None:
    """Commands need no address if exactly one local cluster is up."""
    fill(gateway)
    folder = RunFolder("here")
    folder.path.mkdir(parents=True)
    own = ProcessId.of(os.getpid())
    folder.write(
        {
            "supervisor": {"pid": own.pid, "created": own.created},
            "endpoints": {"grpc": gateway.endpoint, "admin": gateway.endpoint},
        }
    )
    status = json.loads(run("status", "--json").stdout)
    assert (status["name"], status["endpoints"]["grpc"]) == ("here", gateway.endpoint)
    assert run("chat", "tiny", "x").exit_code == 0
    port = gateway.endpoint.rpartition(":")[2]
    done = run("workers", "--endpoint", f"localhost:{port}")
    assert done.exit_code == 0, "its address as `headrace up` prints it finds its admin port too"


def test_unreachable_is_exit_code_three(run: Run) -> None:
    """`status` exits with code 3 if the admin port is unreachable, and the error has the address and a hint."""
    done = run("status", "--admin", "127.0.0.1:1")
    assert done.exit_code == 3
    assert "127.0.0.1:1" in done.stderr
    assert "no local cluster is up (`headrace up -f FILE`); for a gateway elsewhere give --endpoint" in done.stderr
