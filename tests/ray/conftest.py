"""Fixtures: a local Ray for the whole run, a driver on this Ray, and the gateway side of the links."""

from __future__ import annotations

import getpass
import os
import shutil
import tempfile
import uuid
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from cluster.ray.backend import ChildBackend
from cluster.ray.local_cluster import LocalRay, LocalRaySettings
from cluster.worker.engine.processes import end_causes
from tests.support.serving import Door, open_door

ENGINE_ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    # The default folder, so that all engines of a run share the code that the first engine has compiled.
    "TORCHINDUCTOR_CACHE_DIR": f"{tempfile.gettempdir()}/torchinductor_{getpass.getuser()}",
}


def new_local_ray(name: str) -> LocalRay:
    """Return a local Ray that is not started. Its folder has a path that is short enough for sockets."""
    instance = f"{name}-{uuid.uuid4().hex[:8]}"
    return LocalRay(LocalRaySettings(instance, Path(tempfile.mkdtemp(prefix="hr-"))))


def end_local_ray(ray: LocalRay) -> None:
    """Stop a local Ray and delete its files."""
    ray.stop()
    shutil.rmtree(ray.log_file.parent, ignore_errors=True)
    shutil.rmtree(ray.folder, ignore_errors=True)


@pytest.fixture(scope="package")
def local_ray() -> Iterator[LocalRay]:
    """The Ray that the tests of this package share. It ends with them, since an idle Ray uses a tenth of a core. Its
    processes have the engines' environment variables."""
    ray = new_local_ray("shared")
    # `another` simulates an engine that starts in this process. The name must not reach the ranks that this Ray starts.
    environment = {**ENGINE_ENVIRONMENT, end_causes.ENGINE: "another"}
    before = {name: os.environ.get(name) for name in environment}
    os.environ.update(environment)
    try:
        ray.start()
        yield ray
    finally:
        end_local_ray(ray)
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


@pytest.fixture(scope="package")
async def backend(local_ray: LocalRay) -> AsyncIterator[ChildBackend]:
    """A backend with a driver process on the shared Ray, for a cluster named `test`."""
    driver = ChildBackend("test", local_ray.address, local_ray.environment(), local_ray.log_file.parent / "driver.log")
    try:
        yield driver
    finally:
        await driver.shutdown()
        await driver.close()


@pytest.fixture
async def door() -> AsyncIterator[Door]:
    """The gateway side of the links, on loopback."""
    async with open_door() as opened:
        yield opened
