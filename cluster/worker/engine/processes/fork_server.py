"""Fork server: a process that has already imported vLLM and from which the engine's processes are forked.

Problem: a cold start consists mostly of imports. The replica imports vLLM, torch and transformers. Then vLLM's engine
core and each rank start as new interpreters and import these modules again, one process after the other. So the owner
of an engine, such as the replica, first starts multiprocessing's fork server, which imports the modules in parallel
with the owner. Core and ranks are then forks of the server.

Invariants: the server is a new interpreter, so it has none of the replica's sockets or thread locks. The server has one
thread. A fork gets the current environment of the process that starts it, as a spawned process would. The server ends
when the last process connected to it has ended.

By default the server is used only with vLLM's CPU build, since it has not been tried on GPUs.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib.metadata
import importlib.util
import os
import sys
import threading
from collections.abc import Callable, Iterator
from multiprocessing import context, current_process, forkserver
from multiprocessing.process import BaseProcess
from pathlib import Path

from cluster.worker.engine.processes import sockets

START = "HEADRACE_ENGINE_START"
"""Environment variable: `fork-server` or `spawn`. If it is unset, the vLLM build decides."""
PRELOAD = "cluster.worker.engine.processes.preload"
_lock = threading.Lock()


def is_wanted() -> bool:
    """Return whether engine processes should be forks of the server.

    Raises ValueError if HEADRACE_ENGINE_START has an invalid value.
    """
    word = os.environ.get(START, "")
    if word not in ("", "fork-server", "spawn"):
        raise ValueError(f"{START}={word!r}: use fork-server or spawn, or leave it unset")
    if not sys.platform.startswith("linux") or word == "spawn":
        return False
    return word == "fork-server" or cpu_build()


def start() -> None:
    """Start the fork server if `is_wanted` returns True. The server imports its modules while this process continues.
    Idempotent."""
    if not is_wanted():
        return
    with _lock, _preloaded_libraries():
        _create_folder()
        forkserver.set_forkserver_preload([PRELOAD])
        forkserver.ensure_running()


def is_running() -> bool:
    """Return whether this process has started a fork server."""
    return getattr(forkserver._forkserver, "_forkserver_address", None) is not None


def server_pids() -> set[int]:
    """Return the fork server's pid as a set; an empty set if there is no server. Each fork of the server is a process
    of an engine."""
    pid = getattr(forkserver._forkserver, "_forkserver_pid", None)
    return set() if pid is None else {int(pid)}


def new_process(name: str, target: Callable[..., object], args: tuple[object, ...]) -> BaseProcess:
    """Return a process that becomes a fork of the server when it is started; without a server, a spawned process."""
    make = _Process if is_running() else _SpawnedProcess
    return make(name=name, target=target, args=args, daemon=True)


def install(*, rank_in_core: bool = False) -> None:
    """Make vLLM start its processes as forks of the fork server. Does nothing if no fork server is running.

    A process whose compute threads are bound to CPUs is spawned instead, since libgomp reads the binding when a program
    starts. Ranks have compute threads. So does the engine core if it runs the only rank (`rank_in_core`).
    """
    if not is_running():
        return
    import vllm.v1.engine.utils as core_starts
    import vllm.v1.executor.multiproc_executor as rank_starts
    from vllm.utils.system_utils import get_mp_context

    computing = _Context if os.environ.get("VLLM_CPU_OMP_THREADS_BIND") == "nobind" else get_mp_context
    core_starts.get_mp_context = computing if rank_in_core else _Context
    rank_starts.get_mp_context = computing


class _Process(context.ForkServerProcess):
    """A process that is forked by the fork server. It gets the environment of the process that starts it, instead of
    the fork server's environment."""

    _environment: dict[str, str]

    def start(self) -> None:
        """Start the fork. Hide this process's main program, so that the fork does not run it again."""
        self._environment = dict(os.environ)
        with _hidden_main():
            super().start()

    def run(self) -> None:
        """Set up the environment in the fork and run its target."""
        os.environ.clear()
        os.environ.update(self._environment)
        # Python's ensure_running would start a second server for the forks of a fork.
        forkserver._forkserver.ensure_running = lambda: None  # type: ignore[method-assign]
        if "vllm" in sys.modules:
            install()
        super().run()


class _SpawnedProcess(context.SpawnProcess):
    def start(self) -> None:
        """Start the process. Hide this process's main program, which the new process would run again."""
        with _hidden_main():
            super().start()


class _Context(context.ForkServerContext):
    Process = _Process


def _create_folder() -> None:
    """Create the folder for the server's socket.

    multiprocessing's default folder would remain when a replica is killed. The folder that is created here is removed
    by the reaper (ray/reaper.py) or by the next engine on this host.
    """
    known: dict[str, object] = current_process()._config  # type: ignore[attr-defined]
    if known.get("tempdir") is None:
        own = sockets.OwnFolder(sockets.FORKS)
        known["tempdir"] = str(own.path)
        atexit.register(own.remove)


@contextlib.contextmanager
def _hidden_main() -> Iterator[None]:
    """Hide the main program's path while the context is open.

    Otherwise multiprocessing would run the program in the child, which takes seconds for Ray's worker.
    """
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
    """While the context is open, set LD_PRELOAD to the libgomp and tcmalloc that vLLM's CPU platform requires."""
    before = os.environ.get("LD_PRELOAD")
    libraries = _library("vllm", "libs/libtcmalloc*.so*"), _library("torch", "../torch.libs/libgomp*.so*")
    if any(libraries) and not before:
        os.environ["LD_PRELOAD"] = ":".join(filter(None, libraries))
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
    """Return whether the installed vLLM is the build for CPUs."""
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return bool(importlib.metadata.version("vllm-cpu"))
    return False
