"""Tests of the driver's requests and answers, and of the backends that use the driver."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import pytest

from cluster.api.types import ModelSpec
from cluster.controller import bundling
from cluster.process.ports import free_ports
from cluster.ray.backend import ChildBackend, RayAway
from cluster.ray.driver import answer_all
from cluster.ray.jobs import JobBackend
from cluster.wire.bundle import Bundle
from cluster.worker.settings import ReplicaSettings
from tests.support.checkpoints import build_tokenizer

if TYPE_CHECKING:
    from cluster.ray.applications import ServeApps

SETTINGS = ReplicaSettings(ModelSpec(name="m", source="sim://?vocab=9"), "test")


class JournalApps:
    """Fake applications that record each call. `delete` fails."""

    def __init__(self) -> None:
        self.journal: list[object] = []

    def observe(self) -> dict[str, Any]:
        """Return an empty state."""
        return {"details": {}, "nodes": []}

    def deploy(self, settings: ReplicaSettings) -> None:
        """Record the call."""
        self.journal.append(settings)

    def scale(self, model: str, replicas: int) -> None:
        """Record the call."""
        self.journal.append((model, replicas))

    def delete(self, model: str) -> None:
        """Raise an error."""
        raise RuntimeError(f"no {model}")

    def shutdown(self) -> None:
        """Record the call."""
        self.journal.append("shutdown")


def test_requests_are_answered_in_order() -> None:
    """Each request gets one answer, including each request that fails or is invalid."""
    apps, out = JournalApps(), io.StringIO()
    requests = [
        {"do": "observe"},
        {"do": "deploy", "settings": SETTINGS.to_json()},
        {"do": "scale", "app": "m", "replicas": 3},
        {"do": "delete", "app": "m"},
        {"do": "dance"},
        {"do": "shutdown"},
    ]
    failed = answer_all(cast("ServeApps", apps), [*map(json.dumps, requests), "{"], out, "MARK ")
    answers = [json.loads(line.removeprefix("MARK ")) for line in out.getvalue().splitlines()]
    assert [next(iter(answer)) for answer in answers] == ["ok", "ok", "ok", "error", "error", "ok", "error"]
    assert answers[3] == {"error": "RuntimeError: no m"}
    assert "do must be one of observe, deploy, scale, delete, shutdown, not 'dance'" in answers[4]["error"]
    assert failed == 3
    assert apps.journal == [SETTINGS, ("m", 3), "shutdown"]


async def test_no_dashboard_is_ray_away() -> None:
    """Observing an external cluster that does not answer raises RayAway with the address of the cluster."""
    url = f"http://127.0.0.1:{free_ports(1)[0]}"
    with pytest.raises(RayAway, match=url):
        await JobBackend("test", url).observe()


@pytest.mark.ray
@pytest.mark.thorough
async def test_a_lost_driver_is_replaced(backend: ChildBackend) -> None:
    """After the loss of the driver, the next call starts a new driver. A failed request does not end the driver."""
    await backend.observe()
    await backend.close()
    assert (await backend.observe()).nodes
    with pytest.raises(RayAway):
        await backend.scale("nobody", 1)
    assert (await backend.observe()).nodes, "a failed request must not cost the driver"


@pytest.mark.slow
async def test_bundle_is_built_in_a_process_of_its_own(tmp_path: Path) -> None:
    """`bundling.build` returns a tokenizer bundle and the model's properties. For an invalid source the bundle is None,
    and the properties contain the reason."""
    folder = build_tokenizer("llama", tmp_path / "model")
    (folder / "config.json").write_text('{"model_type": "llama", "max_position_embeddings": 99}')
    generation = {"temperature": 0.6, "top_p": 1.0, "top_k": 20, "max_new_tokens": 77, "do_sample": True}
    (folder / "generation_config.json").write_text(json.dumps(generation))
    settings = ReplicaSettings(ModelSpec(name="m", source=f"sim://{folder}"), "test")
    bundle, known = await bundling.build(settings, tmp_path / "bundles")
    assert bundle is not None
    assert "tokenizer.json" in bundle.files
    assert (known.bundle_digest, known.max_model_len, known.family) == (bundle.digest, 99, "llama")
    assert known.default_sampling == {"temperature": 0.6, "top_k": 20, "max_tokens": 77}
    assert Bundle.load(tmp_path / "bundles" / bundle.digest.replace(":", "-")) == bundle
    nothing, about = await bundling.build(ReplicaSettings(ModelSpec(name="m", source="/nowhere"), "test"), tmp_path)
    assert nothing is None
    assert "there is no folder /nowhere" in about.trouble
