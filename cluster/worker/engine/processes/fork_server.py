"""Engine processes that fork from a server which has imported vLLM already.

Problem: a cold start is mostly imports. vLLM's engine core and each of its ranks are new interpreters that import vLLM,
torch and transformers, one after the other, and the replica has done so before them. Here the replica starts a fork
server (multiprocessing's) as its first act, which imports beside the replica itself; core and ranks are forks of it.

Invariants: the server is a new interpreter, so nothing of the replica is in it, neither sockets nor locks of threads.
It has one thread. A fork gets the environment that its parent has when it starts it, as a spawned process would. The
server ends when the last process that knows it has ended.

On vLLM's CPU build alone, unless HEADRACE_ENGINE_START asks for it: on GPUs it has not been tried.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib.metadata
import importlib.util
import os
import sys
import threading
from collections.abc import Iterator
from multiprocessing import context, current_process, forkserver
from pathlib import Path

from cluster.worker.engine.processes import sockets

START = "HEADRACE_ENGINE_START"
"""Environment: `fork-server`, `spawn`, or by the build where it is not set."""
PRELOAD = "cluster.worker.engine.processes.preload"
_lock = threading.Lock()


def wanted() -> bool:
    """Whether engine processes are to be forks. Raises ValueError for an unknown word."""
    word = os.environ.get(START, "")
    if word not in ("", "fork-server", "spawn"):
        raise ValueError(f"{START}={word!r}: use fork-server or spawn, or leave it out")
    if not sys.platform.startswith("linux") or word == "spawn":
        return False
    return word == "fork-server" or cpu_build()


def begin() -> None:
    """Start the server where it is wanted, and let it import beside this process. Idempotent."""
    if not wanted():
        return
    with _lock, _preloaded_libraries():
        _have_own_folder()
        forkserver.set_forkserver_preload([PRELOAD])
        forkserver.ensure_running()


def begun() -> bool:
    """Whether there is a server here."""
    return getattr(forkserver._forkserver, "_forkserver_address", None) is not None


def server() -> set[int]:
    """Its pid, where there is one: what it forks is an engine's."""
    pid = getattr(forkserver._forkserver, "_forkserver_pid", None)
    return set() if pid is None else {int(pid)}


def install(*, rank_in_core: bool = False) -> None:
    """Let vLLM start its processes as forks of the server, where there is one; but what computes and binds its threads
    is spawned, for libgomp reads how when a program begins: ranks, or the core, where the rank is in it."""
    if not begun():
        return
    import vllm.v1.engine.utils as core_starts
    import vllm.v1.executor.multiproc_executor as rank_starts
    from vllm.utils.system_utils import get_mp_context

    computing = _Context if os.environ.get("VLLM_CPU_OMP_THREADS_BIND") == "nobind" else get_mp_context
    core_starts.get_mp_context = computing if rank_in_core else _Context
    rank_starts.get_mp_context = computing


class _Process(context.ForkServerProcess):
    """A fork with the environment of whoever starts it."""

    _environment: dict[str, str]

    def start(self) -> None:
        """Start it, without the main program of this process: a fork does not run that again."""
        self._environment = dict(os.environ)
        with _no_main():
            super().start()

    def run(self) -> None:
        """In the fork."""
        os.environ.clear()
        os.environ.update(self._environment)
        # Python's own would start a second server for the forks of a fork.
        forkserver._forkserver.ensure_running = lambda: None  # type: ignore[method-assign]
        if "vllm" in sys.modules:
            install()
        super().run()


class _Context(context.ForkServerContext):
    Process = _Process


def _have_own_folder() -> None:
    """For the server's socket: multiprocessing removes the folder that it makes as its process ends, and replicas are
    killed. This one is removed by whoever ends them (reaper.py) or starts the next engine, too."""
    known: dict[str, object] = current_process()._config  # type: ignore[attr-defined]
    if known.get("tempdir") is None:
        own = sockets.OwnFolder(sockets.FORKS)
        known["tempdir"] = str(own.path)
        atexit.register(own.remove)


@contextlib.contextmanager
def _no_main() -> Iterator[None]:
    """multiprocessing carries the main program's path along and runs it in the child; Ray's worker takes seconds."""
    main = sys.modules["__main__"]
    with _lock:
        names = vars(main)
        kept = {name: names.pop(name) for name in ("__file__", "__spec__") if name in names}
        main.__spec__ = None
        try:
            yield
        finally:
            for name, value in kept.items():
                names[name] = value


@contextlib.contextmanager
def _preloaded_libraries() -> Iterator[None]:
    """As vLLM's CPU platform asks of its processes: torch's own libgomp, and its allocator, before anything else."""
    before = os.environ.get("LD_PRELOAD")
    found = _library("vllm", "libs/libtcmalloc*.so*"), _library("torch", "../torch.libs/libgomp*.so*")
    if any(found) and not before:
        os.environ["LD_PRELOAD"] = ":".join(filter(None, found))
    try:
        yield
    finally:
        if before is None:
            os.environ.pop("LD_PRELOAD", None)


def _library(package: str, pattern: str) -> str:
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        return ""
    folder, _, name = pattern.rpartition("/")
    return next((str(path) for path in sorted((Path(spec.origin).parent / folder).resolve().glob(name))), "")


def cpu_build() -> bool:
    """Whether it is vLLM's for CPUs that is installed."""
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return bool(importlib.metadata.version("vllm-cpu"))
    return False
