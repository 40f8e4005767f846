"""Test of the complete controller, as `headrace up` runs it with a local Ray. The controller starts, serves, and leaves
no process behind when it is stopped."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest

from cluster.api.types import ModelState
from cluster.config.document import parse
from cluster.controller.process import run_controller
from cluster.ray import reaper
from tests.ray.conftest import end_local_ray, new_local_ray
from tests.ray.test_serve import in_state
from tests.support.checkpoints import build_tokenizer
from tests.support.cpu import time_within
from tests.support.serving import Door, greedy

pytestmark = pytest.mark.ray


@pytest.mark.thorough
async def test_from_configuration_to_ready_to_nothing(
    door: Door, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model of the configuration file becomes READY with a tokenizer bundle. After the stop of Serve and Ray, no
    process is left."""
    folder = build_tokenizer("llama", tmp_path / "model")
    text = f"""
api_version: headrace/v1
name: demo
models:
  - {{name: m, source: "sim://{folder}?decode_ms=1", max_model_len: 512}}
"""
    ray = new_local_ray("whole")
    stop = asyncio.Event()
    try:
        ray.start()
        for name, value in ray.environment().items():
            monkeypatch.setenv(name, value)
        instance = os.environ[reaper.INSTANCE_ENV]
        running = asyncio.create_task(
            run_controller(
                parse(text),
                instance=instance,
                ray_address=ray.address,
                gateways=[door.address],
                run_folder=tmp_path / "run",
                stop=stop,
                end_serve=True,
            )
        )
        entry = await in_state(door, "m", ModelState.READY)
        link = await door.worker("m")
        assert entry.bundle_digest == link.identity.bundle_digest
        assert "tokenizer.json" in (await door.hub.bundles.fetch(entry.bundle_digest)).files
        assert len(await greedy(link, [1, 2, 3], 4)) == 4
        with time_within(10.0):
            stop.set()
            await running
            ray.stop()
        assert reaper.find(instance, ray.folder) == frozenset()
    finally:
        end_local_ray(ray)
