"""Tests of `RayProcess`, which supervises the Ray of a local cluster, with a fake of LocalRay."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from pathlib import Path

import pytest

from cluster.cli.local import ray_process
from cluster.cli.local.children import StartFailed
from cluster.cli.local.ray_process import RayProcess, link_session
from cluster.ray.local_cluster import LocalRaySettings, RayDidNotStart
from tests.support.serving import eventually


class FakeRay:
    """Fake LocalRay that starts no processes. `current`: the newest instance."""

    current: FakeRay
    refuses = False

    def __init__(self, settings: LocalRaySettings) -> None:
        FakeRay.current = self
        self.folder, self.log_file = settings.run_folder / "ray", settings.run_folder / "ray.log"
        self.address = ""
        self.pid: int | None = None
        self.is_draining = False

    def start(self) -> None:
        """Pretend to start. Raises RayDidNotStart once after `refuses` was set."""
        if FakeRay.refuses:
            FakeRay.refuses = False
            raise RayDidNotStart("no port")
        self.pid, self.address = 1, f"ray:{id(self)}"

    def stop(self) -> None:
        """Pretend to end."""
        self.pid = None

    kill = stop

    def environment(self) -> dict[str, str]:
        """Return the environment variables of this Ray: only its address."""
        return {"RAY_ADDRESS": self.address}


@pytest.fixture
def ray(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RayProcess:
    """A Ray that is not started yet."""
    monkeypatch.setattr(ray_process, "LocalRay", FakeRay)
    monkeypatch.setattr(ray_process, "WATCH_S", 0.01)
    return RayProcess(LocalRaySettings("test-of-ray-process", tmp_path))


async def test_a_dead_ray_is_replaced(ray: RayProcess) -> None:
    """A Ray that has ended, or that drains and has no workers, is replaced by a Ray at a new address.

    A failed start is repeated.
    """
    await ray.start()
    first, unused = FakeRay.current, asyncio.Event()
    assert await ray.address() == (first.address, {"RAY_ADDRESS": first.address})
    reports: list[str] = []

    async def is_unused() -> bool:
        return unused.is_set()

    watch = asyncio.create_task(ray.replace_when_dead(is_unused, list, reports.append))
    first.is_draining = True
    await asyncio.sleep(0.05)
    assert ray.pid == 1, "a worker is still linked"
    FakeRay.refuses = True
    unused.set()
    address = await eventually(lambda: FakeRay.current is not first and FakeRay.current.address, "another is up")
    assert (await ray.address())[0] == address
    assert [report.split(";")[0].split("\n")[0] for report in reports] == ["ray ended", "no port", "ray ended"]
    watch.cancel()
    with suppress(asyncio.CancelledError):
        await watch


async def test_a_ray_that_does_not_start_is_named_with_its_log(ray: RayProcess) -> None:
    """The error of a failed start has Ray's reason and the log file. Stopping an unfinished start raises no error."""
    FakeRay.refuses = True
    with pytest.raises(StartFailed, match=r"no port\n  its log: .*ray.log"):
        await ray.start()
    FakeRay.refuses = True
    await ray.stop_starting(asyncio.ensure_future(ray.start()))
    await eventually(lambda: ray.pid is None, "it has ended")


def test_the_session_of_the_previous_run_is_deleted(tmp_path: Path) -> None:
    """`link_session` makes a symbolic link to the newest session folder of Ray. It deletes the previous session folder
    only if Headrace made that folder."""
    link, ours, other = tmp_path / "ray-session", tmp_path / "headrace-1-a", tmp_path / "elsewhere" / "mine"
    for folder in (ours, other):
        folder.mkdir(parents=True)
    link_session(link, ours)
    assert link.readlink() == ours
    link_session(link, other)
    assert (link.readlink(), ours.exists()) == (other, False)
    link_session(link, None)
    assert (link.is_symlink(), other.exists()) == (False, True)
