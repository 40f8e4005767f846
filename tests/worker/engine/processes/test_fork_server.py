"""The fork server of engine processes: when it is used, and the state of the processes that it forks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.worker.engine.processes import fork_server, sockets

SCRIPT = """
import json, os, sys
from cluster.worker.engine.processes import fork_server as forks

def told(queue, deeper):
    context = forks._Context()
    state = {
        "parent": os.getppid(),
        "marked": os.environ.get("MARK"),
        "begun with": os.environ.get("BEFORE"),
        "main again": hasattr(sys.modules["__main__"], "told"),
        "preloaded": "wave" in sys.modules,
    }
    if deeper:
        os.environ["MARK"] = "inner"
        inner = context.Process(target=told, args=(queue, False))
        inner.start()
        inner.join()
        state["inner code"] = inner.exitcode
    queue.put(state)

if __name__ == "__main__":
    os.environ["BEFORE"] = "yes"
    forks.PRELOAD = "wave"
    forks.start()
    forks.start()
    del os.environ["BEFORE"]
    os.environ["MARK"] = "outer"
    import told_by_fork
    context = forks._Context()
    queue = context.SimpleQueue()
    process = context.Process(target=told_by_fork.told, args=(queue, True))
    process.start()
    both = [queue.get(), queue.get()]
    process.join()
    print(json.dumps({"both": both, "code": process.exitcode, "own main": __file__}))
"""


def test_forks_carry_their_starters_environment(tmp_path: os.PathLike[str]) -> None:
    """A forked process, and a process that it starts in turn, are both forks of one fork server and have the preloaded
    modules.

    Each has the environment of the process that started it, and neither runs the main program again.
    """
    for name in ("told_by_fork.py", "program.py"):
        with open(os.path.join(tmp_path, name), "w") as file:
            file.write(SCRIPT)
    ran = subprocess.run(
        [sys.executable, os.path.join(tmp_path, "program.py")],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, fork_server.START: "fork-server", "PYTHONPATH": f"{tmp_path}:{os.getcwd()}"},
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    result = json.loads(ran.stdout)
    inner, outer = result["both"]
    assert (outer["marked"], inner["marked"]) == ("outer", "inner")
    assert outer["parent"] == inner["parent"]
    assert result["code"] == outer["inner code"] == 0
    for fork in (outer, inner):
        assert fork["begun with"] is None
        assert fork["preloaded"]
        assert not fork["main again"]
    assert result["own main"].endswith("program.py")


HOLDS = """
import sys
from multiprocessing import util
from cluster.worker.engine.processes import fork_server as forks

forks.PRELOAD = "wave"
forks.start()
print(util.get_temp_dir(), flush=True)
sys.stdin.read()
"""


@pytest.fixture
def temporary() -> Iterator[Path]:
    """A temporary folder with a short path.

    The path of a socket may have at most 107 bytes. pytest's own folders have longer paths when tests run in parallel.
    """
    with tempfile.TemporaryDirectory(prefix="hr-") as folder:
        yield Path(folder)


@pytest.mark.parametrize("killed", [False, True])
def test_the_servers_folder_goes(temporary: Path, killed: bool) -> None:
    """The fork server's folder is removed when the server's owner ends. If the owner was killed, the next engine's
    start removes the folder."""
    environment = {**os.environ, fork_server.START: "fork-server", "PYTHONPATH": os.getcwd(), "TMPDIR": str(temporary)}
    command = [sys.executable, "-c", HOLDS]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stdout is not None
        folder = Path(process.stdout.readline().strip())
        assert folder.parent == temporary
        assert list(folder.iterdir()), "the server's socket"
        if killed:
            process.kill()
    if killed:
        assert sockets.sweep(temporary) == 1
    assert list(temporary.iterdir()) == []


@pytest.mark.parametrize(("word", "wanted"), [("spawn", False), ("fork-server", True)])
def test_a_word_decides(monkeypatch: pytest.MonkeyPatch, word: str, wanted: bool) -> None:
    """The environment variable `fork_server.START` decides whether the fork server is used. This holds for every vLLM
    build."""
    monkeypatch.setenv(fork_server.START, word)
    assert fork_server.is_wanted() is wanted


def test_another_word_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """An invalid value of the environment variable is refused with an error that names the two valid values."""
    monkeypatch.setenv(fork_server.START, "thread")
    with pytest.raises(ValueError, match="use fork-server or spawn"):
        fork_server.is_wanted()


def test_where_no_server_was_begun_nothing_changes() -> None:
    """Without a running fork server, as for an engine outside a replica, `install` leaves vLLM alone.

    This runs in a new interpreter, since other tests of this process may have started a fork server.
    """
    program = (
        "import sys\n"
        "from cluster.worker.engine.processes import fork_server\n"
        "fork_server.install()\n"
        "print(fork_server.is_running(), 'vllm' in sys.modules)\n"
    )
    ran = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=120, cwd=os.getcwd(), check=False
    )
    assert ran.stdout.split() == ["False", "False"], ran.stderr
