"""Trials of grammars before the engine gets them, in processes that the kernel ends (probe_process.py).

Each tenant has at most one trial at a time, so that a tenant's costly grammars delay its own calls only. The result of
a trial is remembered. A trial that takes longer than an ordinary one goes on at a lower priority.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import os
import signal
import socket
import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from typing import Any

import structlog

from cluster.api.outcomes import Outcome
from cluster.api.ports import EngineRefused
from cluster.api.types import EngineRequest, Grammar
from cluster.process.background import NICENESS, lower_threads, run_threads_when_idle
from cluster.worker.engine.processes import fork_server
from cluster.worker.engine.vllm.grammar import probe_process
from cluster.worker.engine.vllm.grammar.grammars import structured_outputs
from cluster.worker.engine.vllm.grammar.structural_tags import STRUCTURAL_TAG, structural_tag
from cluster.worker.engine.vllm.private_names import missing

log = structlog.get_logger("worker")

MAX_TRIALS = 4
"""Greatest number of trials at a time, each of another tenant."""
SPARES = 2
"""Number of processes that wait for grammars. A fork takes up to a second on a busy host."""
PATIENCE_S = 0.02
"""Seconds after which a trial goes on at a lower priority. Its process is not used again."""
IDLE_S = 10.0
"""Seconds within which a trial that runs only on idle cores has a result. On a host without an idle core it is then
begun again, and has a share of a core."""
MAX_WAIT_S = 60.0
"""Seconds after which a trial without a result counts as too costly, however little CPU time it had."""
REMEMBERED = 4096
"""Number of grammars whose result is remembered."""
TOO_COSTLY = (
    f"compiling and trying it takes more than {probe_process.MAX_CPU_S:g} s of CPU time, or more than "
    f"{probe_process.MAX_NEW_BYTES >> 30} GiB of memory; nest fewer loops, counts and optional parts"
)
_KINDS = ("json", "regex", "choice", "grammar", "structural_tag")


class _Child:
    """A process that tries grammars, and the channel to it."""

    def __init__(self, parent: socket.socket) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            socket.send_fds(parent, [b"f"], [theirs.fileno()])
        self._channel = Connection(ours.detach())
        self.slow = False
        self.pid = int(self._receive(MAX_WAIT_S))

    def try_grammar(self, arguments: bytes, *, only_idle: bool) -> str:
        """Return why a grammar costs too much; empty if it does not. Raises EOFError or OSError if the child ended, or
        TimeoutError.

        `only_idle`: whether a trial that takes longer than PATIENCE_S runs on idle cores only, for IDLE_S.
        """
        self._channel.send_bytes(arguments)
        self.slow = not self._channel.poll(PATIENCE_S)
        if self.slow:
            lower_threads(self.pid, 2 * NICENESS)
            if only_idle:
                run_threads_when_idle(self.pid)
        return self._receive(IDLE_S if only_idle else MAX_WAIT_S)

    def _receive(self, within_s: float) -> str:
        if not self._channel.poll(within_s):
            raise TimeoutError
        return self._channel.recv_bytes().decode()

    def end(self) -> None:
        """Kill the process, if it has not ended."""
        with contextlib.suppress(OSError):
            os.kill(self.pid, signal.SIGKILL)


class GrammarProbe:
    """The trials of one engine's grammars. `start` begins the parent process; `close` ends it."""

    def __init__(self) -> None:
        self._config: Any = None
        self._parent: socket.socket | None = None
        self._process: Any = None
        self._idle: list[_Child] = []
        self._children: set[_Child] = set()
        self._lock = threading.Lock()
        self._threads = ThreadPoolExecutor(MAX_TRIALS + 1, "grammar-trial")  # one more, for spares
        self._trials = asyncio.Semaphore(MAX_TRIALS)
        self._turns: dict[str, tuple[asyncio.Lock, int]] = {}
        self._known: OrderedDict[bytes, str] = OrderedDict()

    def start(self, config: Any) -> None:
        """Start the parent process, which loads the tokenizer while this process goes on.

        `config`: the engine's VllmConfig. With a vLLM that lacks a private name, grammars are not tried.
        """
        if config.model_config.skip_tokenizer_init or config.model_config.runner_type != "generate":
            return
        if lacking := missing(probe_process.SYMBOLS):
            log.warning("grammar.not_tried", reason=f"this vLLM lacks {', '.join(lacking)}")
            return
        self._config = config
        self._start_parent()
        self._threads.submit(self._add_spares)

    def _start_parent(self) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            self._process = fork_server.new_process("GrammarProbe", probe_process.serve, (theirs, self._config))
            self._process.start()
        self._parent = ours

    async def check(self, request: EngineRequest, is_live: Callable[[], bool]) -> None:
        """Raise EngineRefused if a request's grammar costs too much. `is_live`: returns whether the request was not
        aborted meanwhile."""
        grammar = request.sampling.grammar
        if self._config is None or grammar is None or grammar.kind == "json_object" or request.pooling is not None:
            return
        key = hashlib.sha256(repr((grammar.kind, grammar.value)).encode("utf-8", "replace")).digest()
        if key not in self._known:
            async with self._turn(request.tenant), self._trials:
                if key not in self._known and is_live():
                    await self._try(key, grammar)
        problem = self._known.get(key, "")
        if key in self._known:
            self._known.move_to_end(key)
        if problem:
            raise EngineRefused(Outcome.INVALID_FIELD.name, f"{grammar.field}: {problem}", grammar.field)

    async def _try(self, key: bytes, grammar: Grammar) -> None:
        loop = asyncio.get_running_loop()
        self._known[key] = await asyncio.shield(loop.run_in_executor(self._threads, self._problem, grammar))
        if len(self._known) > REMEMBERED:
            self._known.popitem(last=False)

    def _problem(self, grammar: Grammar) -> str:
        """Try a grammar in a child. Blocks. Raises OSError if no child can be started."""
        params = structural_tag(grammar) if grammar.kind == STRUCTURAL_TAG else structured_outputs(grammar)
        chosen = {kind: value for kind in _KINDS if (value := getattr(params, kind)) is not None}
        arguments = json.dumps(chosen).encode()
        problem = TOO_COSTLY
        for only_idle in (True, False):
            with contextlib.suppress(TimeoutError):
                problem = self._tried(arguments, only_idle=only_idle)
                break
        if problem:
            log.warning("grammar.refused", kind=grammar.kind, bytes=len(str(grammar.value)), reason=problem)
        return problem

    def _tried(self, arguments: bytes, *, only_idle: bool) -> str:
        """Return why a grammar costs too much. Raises TimeoutError."""
        child = self._child()
        try:
            return child.try_grammar(arguments, only_idle=only_idle)
        except TimeoutError:
            child.slow = True
            raise
        except (EOFError, OSError):
            child.slow = True
            return TOO_COSTLY
        finally:
            if child.slow:
                self._children.discard(child)
                child.end()
                self._threads.submit(self._add_spares)
            else:
                self._idle.append(child)

    def _child(self) -> _Child:
        with contextlib.suppress(IndexError):
            return self._idle.pop()
        return self._new_child()

    def _add_spares(self) -> None:
        with contextlib.suppress(OSError):
            while len(self._idle) < SPARES:
                self._idle.append(self._new_child())

    def _new_child(self) -> _Child:
        for attempt in range(2):
            with self._lock:
                if self._parent is None:
                    raise OSError("the grammars' trials are closed")
                if attempt:
                    self._end_parent()
                    self._start_parent()
                parent = self._parent
            try:
                child = _Child(parent)
                self._children.add(child)
                return child
            except (EOFError, OSError) as error:
                log.warning("grammar.trial_not_started", reason=f"{type(error).__name__}: {error}")
        raise OSError("the process that tries grammars does not start")

    @contextlib.asynccontextmanager
    async def _turn(self, tenant: str) -> Any:
        """Wait until no other grammar of the tenant is tried."""
        lock, waiting = self._turns.get(tenant, (asyncio.Lock(), 0))
        self._turns[tenant] = lock, waiting + 1
        try:
            async with lock:
                yield
        finally:
            lock, waiting = self._turns[tenant]
            if waiting > 1:
                self._turns[tenant] = lock, waiting - 1
            else:
                del self._turns[tenant]

    def _end_parent(self) -> None:
        if self._parent is not None:
            self._parent.close()
            self._process.kill()
            self._process.join()

    def close(self) -> None:
        """End all processes. Blocks."""
        with self._lock:
            self._config = None
            self._end_parent()
            self._parent = None
        for child in tuple(self._children):
            child.end()
        self._threads.shutdown(wait=False)
