"""Tests of the start and stop of the local Ray, also beside another Ray on the same machine."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from cluster.api.types import ModelSpec
from cluster.ray import reaper
from cluster.ray.backend import ChildBackend, RayAway
from cluster.ray.local_cluster import LocalRay, LocalRaySettings, RayDidNotStart, end_remains
from cluster.worker.engine.processes import sockets
from cluster.worker.settings import ReplicaSettings
from tests.ray.conftest import end_local_ray, new_local_ray
from tests.support.cpu import time_within
from tests.support.serving import settled

SLEEPER = [sys.executable, "-c", "print('up', flush=True); import time; time.sleep(600)"]


def sleeper(**environment: str) -> subprocess.Popen[bytes]:
    """Start a process that sleeps until killed."""
    process = subprocess.Popen(SLEEPER, env={**os.environ, **environment}, stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"up\n"
    return process


def test_reaper_ends_the_tagged_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reaper ends the processes that a killed Headrace instance has left behind. Processes of an instance with a
    similar id are not ended. The reaper also removes the socket folders of killed engines."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    for prefix in (sockets.PREFIX, sockets.FORKS):
        (tmp_path / f"{prefix}left").mkdir()
    ours, theirs = sleeper(HEADRACE_INSTANCE="abc"), sleeper(HEADRACE_INSTANCE="abcd")
    try:
        assert reaper.find("abc") == {ours.pid}
        assert reaper.end("abc", grace_s=5.0) == 1
        assert ours.wait(60.0) == -15
        assert theirs.poll() is None
        assert list(tmp_path.iterdir()) == []
    finally:
        theirs.kill()
        theirs.wait()
        ours.kill()


def test_reaper_takes_shared_memory_along() -> None:
    """The reaper removes the shared memory and semaphores of killed engines, but not those of other clusters."""
    hold = (
        "import multiprocessing as p, time; from multiprocessing import resource_tracker as t, shared_memory as m; "
        "t.register = lambda *a: 0; b = m.SharedMemory(create=True, size=64); l = p.get_context('spawn').Lock(); "
        "print(b.name, 'sem.' + l._semlock.name.lstrip('/'), flush=True); time.sleep(600)"
    )
    processes = []
    for instance in ("abc", "abcd"):
        environment = {**os.environ, "HEADRACE_INSTANCE": instance}
        processes.append(subprocess.Popen([sys.executable, "-c", hold], env=environment, stdout=subprocess.PIPE))
    ours, theirs = processes
    try:
        lines = [process.stdout.readline().decode().split() for process in processes if process.stdout is not None]
        names = {name for line in lines for name in line}
        assert len(names) == 4
        assert names <= set(os.listdir("/dev/shm"))
        reaper.end("abc", grace_s=0.0)
        assert ours.wait(60.0) < 0
        assert names & set(os.listdir("/dev/shm")) == set(lines[1])
    finally:
        reaper.end("abcd", grace_s=0.0)
        ours.kill()
        theirs.wait()
    assert not names & set(os.listdir("/dev/shm"))


def test_reaper_finds_by_output(tmp_path: Path) -> None:
    """A process without the cluster's id in its environment still belongs to the cluster if its output goes to a file
    below the cluster's folder. A process that only reads such a file does not."""
    sleep = [sys.executable, "-c", "import time; time.sleep(600)"]
    path = tmp_path / "log"
    with path.open("wb") as log, path.open("rb") as source:
        process = subprocess.Popen(sleep, stdout=log)
        reader = subprocess.Popen(sleep, stdin=source, pass_fds=[source.fileno()])
    try:
        assert reaper.find("no-such-instance", tmp_path) == {process.pid}
        assert reaper.find("no-such-instance", tmp_path / "other") == frozenset()
        reaper.end("no-such-instance", tmp_path, grace_s=5.0)
        assert process.wait(60.0) == -15
        assert reader.poll() is None
    finally:
        for each in (process, reader):
            each.kill()
            each.wait()


@pytest.mark.ray
def test_a_ray_that_cannot_start_says_why(tmp_path: Path) -> None:
    """When Ray cannot start, the error contains Ray's message, and no process is left."""
    ray = LocalRay(LocalRaySettings("cannot", tmp_path, object_store_bytes=1))
    with pytest.raises(RayDidNotStart, match="object"):
        ray.start()
    assert reaper.find("cannot", ray.folder) == frozenset()


@pytest.mark.ray
@pytest.mark.thorough
def test_logs_come_home(tmp_path: Path) -> None:
    """If the path of the run folder is too long for Ray's sockets, Ray uses a substitute folder. When Ray is stopped,
    its logs are copied to the run folder, and the substitute folder is removed."""
    ray = LocalRay(LocalRaySettings("home", tmp_path / ("x" * 40)))
    try:
        ray.start()
        assert ray.folder.parent != ray.log_file.parent
    finally:
        ray.stop()
    assert (ray.log_file.parent / "ray-logs" / "gcs_server.out").exists()
    assert not ray.folder.exists()


def test_stops_in_several_threads(tmp_path: Path) -> None:
    """A start that fails may stop Ray while another thread stops it. The logs are kept, and no call fails."""
    ray = LocalRay(LocalRaySettings("twice", tmp_path / ("x" * 40)))
    logs = ray.folder / "session_latest" / "logs"
    logs.mkdir(parents=True)
    for number in range(300):
        (logs / f"{number}.out").touch()
    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(lambda _: ray.stop(), range(4))) == [0] * 4
    assert len(list((ray.log_file.parent / "ray-logs").iterdir())) == 300
    assert not ray.folder.exists()


@pytest.mark.ray
@pytest.mark.thorough
async def test_stop_leaves_nothing_and_spares_a_foreign_ray() -> None:
    """After a stop, no process of the cluster is left, and another Ray still answers."""
    foreign, ours = new_local_ray("foreign"), new_local_ray("ours")
    try:
        foreign.start()
        ours.start()
        backend = ChildBackend("test", ours.address, ours.environment())
        await backend.deploy(ReplicaSettings(ModelSpec(name="m", source="sim://?vocab=100"), "test"))
        await settled(backend, lambda s: [seen.running for seen in s.apps.values()] == [1], "the replica runs")
        instance, folder = ours.environment()[reaper.INSTANCE_ENV], ours.folder
        assert len(reaper.find(instance, folder)) >= 6
        with time_within(10.0):
            await backend.shutdown()
            ours.stop()
        assert reaper.find(instance, folder) == frozenset()
        with pytest.raises(RayAway):
            await backend.observe()
        await backend.close()
        theirs = ChildBackend("theirs", foreign.address, foreign.environment())
        assert len((await theirs.observe()).nodes) == 1
        await theirs.close()
    finally:
        end_local_ray(ours)
        end_local_ray(foreign)


@pytest.mark.thorough
@pytest.mark.ray
def test_remains_of_a_lost_cluster_are_found() -> None:
    """The processes that a killed `headrace up` leaves behind are found by the cluster's instance and run folder, and
    can be ended."""
    ray = new_local_ray("lost")
    ray.start()
    try:
        instance = ray.environment()[reaper.INSTANCE_ENV]
        assert end_remains(instance, ray.log_file.parent) >= 5
        assert reaper.find(instance, ray.folder) == frozenset()
    finally:
        end_local_ray(ray)
