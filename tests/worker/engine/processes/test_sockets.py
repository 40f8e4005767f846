"""vLLM's processes have their sockets in a folder that is removed when their engines end."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from cluster.api.types import ModelSpec
from cluster.worker.engine.processes import sockets
from cluster.worker.engine.vllm.engine import VllmEngine
from tests.support.ray_head import OWN_PROCESSES


def test_the_folder_goes_with_the_last_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two engines of one process share the folder of their sockets. When the second engine ends, the folder is removed
    with its contents."""
    monkeypatch.delenv(sockets.ENV, raising=False)
    ours = sockets.SocketFolder(tmp_path)
    assert ours.acquire()
    assert ours.acquire()
    folder = Path(os.environ[sockets.ENV])
    (folder / "socket").touch()
    ours.release()
    assert folder.exists()
    ours.release()
    assert not folder.exists()
    assert sockets.ENV not in os.environ


def test_what_a_killed_process_left_is_swept(tmp_path: Path) -> None:
    """Folders of killed processes are removed. Folders of live processes and other files are not removed."""
    ours = [sockets.OwnFolder(prefix, tmp_path) for prefix in (sockets.PREFIX, sockets.FORKS)]
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / f"{sockets.PREFIX}file").touch()
    (tmp_path / f"{sockets.PREFIX}link").symlink_to(tmp_path / "elsewhere")
    kept = set(tmp_path.iterdir())
    for prefix in (sockets.PREFIX, sockets.FORKS):
        (tmp_path / f"{prefix}left" / "socket").mkdir(parents=True)
    assert sockets.sweep(tmp_path) == 2
    assert set(tmp_path.iterdir()) == kept
    for own in ours:
        own.remove()
        assert own.path not in tmp_path.iterdir()


@pytest.mark.root
def test_a_living_process_keeps_its_folder_from_other_namespaces(tmp_path: Path) -> None:
    """A live process keeps its folder when a process in another pid namespace removes the folders of dead processes."""
    sweep = (
        "from cluster.worker.engine.processes import sockets; from pathlib import Path; "
        f"sockets.sweep(Path({str(tmp_path)!r}))"
    )
    ours = sockets.OwnFolder(sockets.PREFIX, tmp_path)
    subprocess.run([*OWN_PROCESSES, sys.executable, "-c", sweep], check=True, timeout=300)
    assert list(tmp_path.iterdir()) == [ours.path]
    ours.remove()


@pytest.mark.engine
async def test_a_start_that_fails_leaves_no_folder(
    llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If an engine's start fails, the start itself removes the folder, since no caller closes the engine."""
    monkeypatch.delenv(sockets.ENV, raising=False)
    monkeypatch.setattr(sockets, "OURS", sockets.SocketFolder(tmp_path))
    spec = ModelSpec("tiny", "unused", dtype="float32", max_model_len=10**9)
    with pytest.raises(ValueError, match=r"models\[tiny\]"):
        await VllmEngine(spec, llama_folder).start()
    assert os.listdir(tmp_path) == []
    assert sockets.ENV not in os.environ


def test_a_rank_elsewhere_keeps_vllms_own_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An environment variable of an engine names Headrace's socket folder. On a host without this folder, the variable
    is removed, so that vLLM uses its default folder. A variable that an operator has set to another folder is kept."""
    ours = tmp_path / f"{sockets.PREFIX}1"
    for folder, there, kept in ((ours, True, True), (ours, False, False), (tmp_path / "elsewhere", False, True)):
        if there:
            folder.mkdir()
        elif folder.exists():
            folder.rmdir()
        monkeypatch.setenv(sockets.ENV, str(folder))
        sockets.restore_default_elsewhere()
        assert (sockets.ENV in os.environ) == kept
    monkeypatch.delenv(sockets.ENV)
    sockets.restore_default_elsewhere()


def test_an_operators_own_place_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A socket path that an operator has set in the environment is kept."""
    monkeypatch.setenv(sockets.ENV, str(tmp_path / "elsewhere"))
    assert not sockets.SocketFolder(tmp_path).acquire()
    assert os.environ[sockets.ENV] == str(tmp_path / "elsewhere")
