"""The commands `adapters check` and `adapters load --wait` report whether workers load an adapter."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from typer.testing import Result

from cluster.admin.v1 import adapters_pb2 as pb
from cluster.admin.v1 import admin_pb2_grpc
from cluster.worker.weights.adapter import adapter_digest
from tests.support.adapters import write_adapter
from tests.support.scripted_gateway import Script, ScriptedCatalog
from tests.worker.weights.test_adapter import write_base

Run = Callable[..., Result]
OLD, NEW = "a" * 64, "b" * 64


class Catalog(ScriptedCatalog):
    """A catalog that lists an adapter in one state after another, and then keeps to the last one."""

    def __init__(self, states: list[pb.Adapter]) -> None:
        super().__init__(Script())
        self.states = states

    def LoadAdapter(self, request: pb.LoadAdapterRequest, context: Any) -> pb.LoadAdapterResponse:
        return pb.LoadAdapterResponse(
            adapter=pb.Adapter(
                model=request.name, name=request.adapter, source=request.source, digest=request.digest, load_number=2
            )
        )

    def ListAdapters(self, request: pb.ListAdaptersRequest, context: Any) -> pb.ListAdaptersResponse:
        return pb.ListAdaptersResponse(adapters=[self.states.pop(0) if len(self.states) > 1 else self.states[0]])


@contextmanager
def catalog(*states: pb.Adapter) -> Iterator[str]:
    """Run a server with a Catalog. Yields its host:port."""
    server = grpc.server(ThreadPoolExecutor(2))
    admin_pb2_grpc.add_CatalogServicer_to_server(Catalog(list(states)), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        server.stop(None).wait(60)


def state(digest: str, ready: int, *failures: str, load_number: int = 2) -> pb.Adapter:
    """Return the state of the adapter on one worker."""
    failed = [pb.AdapterFailure(worker_id="w", reason=reason) for reason in failures]
    return pb.Adapter(
        model="m",
        name="a",
        source="s3://b/a",
        digest=digest,
        ready_workers=ready,
        workers=1,
        failures=failed,
        load_number=load_number,
    )


def test_check_prints_the_digest_or_the_fault(run: Run, tmp_path: Path) -> None:
    """`adapters check` prints the digest of a good adapter and exits with 0.

    For a bad adapter it exits with 2, and the error names the file, the key and the remedy.
    """
    base = write_base(tmp_path / "base", 32)
    folder = write_adapter(tmp_path / "a", base)
    done = run("adapters", "check", str(folder), "--model", str(base))
    assert done.exit_code == 0, done.stderr
    assert adapter_digest(folder) in done.stdout
    done = run("adapters", "check", str(folder), "--model", str(base), "--json")
    assert json.loads(done.stdout)["layers"] == 14
    done = run("adapters", "check", str(folder), "--model", str(base), "--max-lora-rank", "4")
    assert done.exit_code == 2
    assert "adapter_config.json: r: 8 is above the engine's max_lora_rank 4; set engine.max_lora_rank" in " ".join(
        done.stderr.split()
    )


@pytest.mark.slow
def test_a_new_digest_is_waited_for(run: Run) -> None:
    """With a digest, `load --wait` waits until the workers have loaded these files, and not others of the source."""
    other = state(NEW, 0, f"it has other files: digest {OLD}, not {NEW}")
    with catalog(state(OLD, 1), other, state(NEW, 1)) as endpoint:
        command = ("adapters", "load", "m", "a", "s3://b/a", "--admin", endpoint, "--digest", NEW, "--wait")
        done = run(*command, "--json")
        assert done.exit_code == 0, done.output
        (shown,) = json.loads(done.stdout)
        assert (shown["digest"], shown["ready_workers"]) == (NEW, 1)


@pytest.mark.slow
def test_an_earlier_load_is_not_waited_for(run: Run) -> None:
    """`load --wait` of an adapter that was loaded before waits for the new load, whether the earlier load has succeeded
    or failed."""
    for earlier in (state(OLD, 1, load_number=1), state("", 0, "no space left", load_number=1)):
        with catalog(earlier, state(NEW, 1)) as endpoint:
            done = run("adapters", "load", "m", "a", "s3://b/a", "--admin", endpoint, "--wait", "--json")
            assert done.exit_code == 0, done.output
            assert json.loads(done.stdout)[0]["digest"] == NEW


@pytest.mark.parametrize("shown", [state(OLD, 1), state(NEW, 0, "it has other files: digest"), state(NEW, 0, "bad")])
def test_a_digest_that_is_not_loaded_is_an_error(run: Run, shown: pb.Adapter) -> None:
    """With a digest, `load --wait` exits with 1 at its time limit if the workers have other files or have failed."""
    with catalog(shown) as endpoint:
        command = ("adapters", "load", "m", "a", "s3://b/a", "--admin", endpoint, "--digest", NEW, "--wait")
        done = run(*command, "--timeout-s", "0")
        assert done.exit_code == 1, done.output
