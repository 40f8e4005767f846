"""A run folder records the supervisor of a cluster and has a lock on the cluster's name."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from cluster.cli.local.run_folder import AlreadyUp, ProcessId, RunFolder


def test_a_name_is_held_by_one() -> None:
    """Locking a locked name raises an error with the remedy, and the name is free again after the lock is closed."""
    with RunFolder("a").lock(), pytest.raises(AlreadyUp, match="headrace down a"):
        RunFolder("a").lock()
    RunFolder("a").lock().close()
    with RunFolder("b").lock(), RunFolder("c").lock():
        pass


def test_a_lock_ends_with_its_process() -> None:
    """The lock of a run folder is free after the process that held the lock was killed."""
    program = (
        "from cluster.cli.local.run_folder import RunFolder; "
        "h = RunFolder('a').lock(); print('held', flush=True); input()"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(AlreadyUp):
            RunFolder("a").lock()
        holder.kill()
    RunFolder("a").lock().close()


def test_a_pid_used_again_is_not_ours() -> None:
    """A process with the recorded id but with another start time does not count as the recorded process."""
    own = ProcessId.of(os.getpid())
    assert own.alive()
    assert not ProcessId(own.pid, own.created - 60).alive()


def test_folders_of_dead_clusters_are_known_but_not_running() -> None:
    """The folder of a crashed cluster is listed as known but not as running, so that `down` can clean up the folder."""
    dead, alive = RunFolder("dead"), RunFolder("alive")
    own = ProcessId.of(os.getpid())
    for run, created in ((dead, own.created - 60), (alive, own.created)):
        run.path.mkdir(parents=True)
        run.write({"instance": "x", "supervisor": {"pid": own.pid, "created": created}})
    assert [run.name for run in RunFolder.running()] == ["alive"]
    assert [run.name for run in RunFolder.known()] == ["alive", "dead"]


def test_unreadable_state_is_no_state() -> None:
    """A damaged state.json is read as an empty state and does not prevent the next start."""
    run = RunFolder("a")
    run.path.mkdir(parents=True)
    run.state_file.write_text("{")
    assert run.state() == {}
    assert run.endpoints() == {}
    assert run.supervisor() is None
