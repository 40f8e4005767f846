"""Work of a gateway in processes of their own, so that its event loop never waits for it.

Problem: parsing, rendering and tokenizing hold the interpreter for milliseconds at a time also in a thread, and the
loop waits for it after every system call; with many such threads that adds up to a quarter of a second. Helpers
(process.py) start with the first job, which waits for the first of them (0.2 to 0.6 s, once), run only where
nothing else wants to, and leave after a while without work. Where none can be had, or one gets no core for seconds,
the caller does the work itself: `run` gives None.

Tenants take turns: of those with jobs that wait, the one served longest ago is next. A job has an amount of CPU
(TooMuchCpu beyond it), and one that ends two helpers in a row is given up (Lost): it goes to no third, and never to
the gateway's own process.

A core on which only such a process runs counts as idle for whoever wakes up; with a merely nice one there, the loop
waits on the other core behind whatever runs there, 15 to 30 ms at a time. Each is a session of its own, since where
Linux shares the processors by session (autogroup, its default outside of control groups), a gateway whose helpers
keep one core busy would have used up its share by that.
"""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
import time
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Final

import structlog

from cluster.api.outcomes import CallError
from cluster.gateway.helpers import wire
from cluster.gateway.helpers.wire import HEAD, OK, OUT_OF_TIME, PIECE_BYTES, REFUSED, SIZE
from cluster.process.background import put_behind, put_last

log = structlog.get_logger("text")

MAX_HELPERS: Final = 4
MAX_FAILURES: Final = 3
"""Helpers lost one after the other, none of which did any work, before no more are started for RETRY_S."""
RETRY_S: Final = 60.0
MAX_LOSSES: Final = 2
"""Helpers that one job may end."""
CPU_S, CPU_S_PER_MB = 10.0, 4.0
"""What a job may use, by the bytes that it brings; honest ones take a hundredth to a tenth of it."""
PATIENCE_S: Final = 2.0
"""A helper that has not answered after so long, and a second more for each megabyte, is late: no other job waits for
it until it has answered, and where it has got less than LEAST_SHARE of a core, its caller does the work itself."""
LEAST_SHARE: Final = 0.2
_ENVIRONMENT: Final = {
    "TOKENIZERS_PARALLELISM": "false",  # the helpers are the parallelism
    # What one body took is there for the next: fresh memory costs a third of the time that 16 MB take.
    "MALLOC_MMAP_THRESHOLD_": str(64 << 20),
    "MALLOC_TRIM_THRESHOLD_": str(128 << 20),
}
Job = tuple[str, tuple[Any, ...], dict[str, Any]]
"""Name of a method of what the helpers serve, its arguments and its keyword arguments."""
Setup = Callable[[], tuple[str, bytes]]
"""What the helpers serve: the kind, and what is needed to make it."""


TOO_MUCH: Final = "too much"
_NOTHING: Final[Job] = ("__repr__", (), {})


class TooMuchCpu(Exception):
    """A job has used all the CPU that it may."""


class Lost(Exception):
    """A job has ended MAX_LOSSES helpers, or raised what no caller foresees."""


class _Helper:
    """One process and the socket to it, which carries one job at a time."""

    def __init__(self, setup: Setup) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "cluster.gateway.helpers.process"],
                stdin=theirs.fileno(),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,  # traces of panics; what went wrong comes as an answer
                start_new_session=True,
                env=os.environ | _ENVIRONMENT,
            )
        put_behind(self._process.pid)
        self._socket = ours
        self._busy = self._ended = False
        try:
            wire.send(ours, setup())
        except OSError:
            self.end()
            raise
        ours.setblocking(False)

    @property
    def pid(self) -> int:
        """The process."""
        return self._process.pid

    def cpu_s(self) -> float:
        """CPU that it has used so far; 0 where that cannot be read."""
        import psutil  # a gateway starts without it

        with suppress(psutil.Error):
            times = psutil.Process(self.pid).cpu_times()
            return float(times.user + times.system)
        return 0.0

    @property
    def out_of_time(self) -> bool:
        """Whether it was ended since its job had used all its CPU. Waits for the end of one that has closed."""
        with suppress(subprocess.TimeoutExpired):
            return self._process.wait(0.1) == -OUT_OF_TIME
        return False

    async def do(self, job: Job, cpu_s: float) -> tuple[str, Any]:
        """A job's answer. Raises OSError when the helper is gone."""
        loop = asyncio.get_running_loop()
        self._busy = True
        try:
            for part in wire.pack((cpu_s, *job)):
                await self._send(loop, memoryview(part))
            size, count = HEAD.unpack(await self._exactly(loop, HEAD.size))
            packed = await self._exactly(loop, size)
            sizes = SIZE.size
            buffers = [
                await self._exactly(loop, SIZE.unpack(await self._exactly(loop, sizes))[0]) for _ in range(count)
            ]
            answer: tuple[str, Any] = wire.unpack(packed, buffers)
            return answer
        finally:
            self._busy = False
            if self._ended:
                self._socket.close()

    async def _send(self, loop: asyncio.AbstractEventLoop, data: memoryview) -> None:
        for at in range(0, data.nbytes, PIECE_BYTES):
            await loop.sock_sendall(self._socket, data[at : at + PIECE_BYTES])
            if data.nbytes > PIECE_BYTES:
                await asyncio.sleep(0)

    async def _exactly(self, loop: asyncio.AbstractEventLoop, size: int) -> bytearray:
        data = bytearray(size)
        view = memoryview(data)
        while view:
            count = await loop.sock_recv_into(self._socket, view[:PIECE_BYTES])
            if not count:
                raise ConnectionResetError("the helper has closed its socket")
            view = view[count:]
            if size > PIECE_BYTES:
                await asyncio.sleep(0)
        return data

    def end(self) -> None:
        """Now: a helper holds nothing that anyone would miss."""
        self._ended = True
        if self._busy:  # closed here, its number would be a new socket's while the loop still waits for the old one
            with suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)
        else:
            self._socket.close()
        self._process.kill()
        self._process.wait()


class HelperPool:
    """The helpers of one purpose. Used from one event loop."""

    def __init__(self, setup: Setup, size: int | None = None, patience_s: float = PATIENCE_S) -> None:
        """`size`: helpers at most; by default as many as there are cores, up to MAX_HELPERS."""
        self._setup = setup
        self._patience_s = patience_s
        self.cpu_s = CPU_S
        """What a small job may use."""
        self._size = size or min(os.cpu_count() or 1, MAX_HELPERS)
        self._helpers: set[_Helper] = set()
        self._idle: list[_Helper] = []
        self._late: set[_Helper] = set()
        self._waiting: OrderedDict[str, deque[asyncio.Future[_Helper | None]]] = OrderedDict()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._starting = False
        self.failures = 0
        """Helpers lost since one did some work."""
        self._failed_at = 0.0
        self._closed = False
        self._end = weakref.finalize(self, _end_all, self._helpers)

    @property
    def pids(self) -> frozenset[int]:
        """Of the helpers that are there."""
        return frozenset(helper.pid for helper in self._helpers)

    async def run(self, job: Job, *, size: int = 0, tenant: str = "", here: bool = True) -> Any:
        """The job's result; None where no helper can be had in time: do it yourself. `size`: bytes that it works on.
        Not `here`: the caller cannot do it, and waits also for a helper that gets no core.

        Raises CallError as the job did, TooMuchCpu, Lost."""
        for _ in range(MAX_LOSSES):
            helper = await self._take(tenant)
            if helper is None:
                return None
            # A job that nobody waits for any longer is finished all the same: its answer must leave the socket.
            patience_s = self._patience_s + size / 1e6
            work = self._spawn(self._work(helper, job, patience_s, self.cpu_s + CPU_S_PER_MB * size / 1e6))
            if not here:
                await asyncio.wait({work})
            elif not await _patiently(work, helper, patience_s):
                return None
            answer: tuple[str, Any] | None = work.result()
            if answer is not None:
                return _result(*answer)
            if self._closed:
                return None
        raise Lost("its helpers ended")

    async def ready(self) -> bool:
        """Wait until all helpers are there; False where none will be."""
        if not self._helpers:
            self._start()
        while self._starting:
            await asyncio.wait(self._tasks, return_when=asyncio.FIRST_COMPLETED)
        return bool(self._helpers)

    def close(self) -> None:
        """End all helpers; calls under way do their work themselves."""
        self._closed = True
        self._end()
        self._idle.clear()
        self._give_up()

    async def _take(self, tenant: str = "") -> _Helper | None:
        if self._idle:
            return self._idle.pop()
        self._start()
        if not self._hope:
            return None
        future: asyncio.Future[_Helper | None] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(tenant, deque()).append(future)
        try:
            return await future
        except asyncio.CancelledError:
            if future.done() and not future.cancelled() and (helper := future.result()) is not None:
                self._give(helper)
            raise

    def _next_waiting(self) -> asyncio.Future[_Helper | None] | None:
        """The first job of the tenant that was served longest ago."""
        while self._waiting:
            tenant, futures = self._waiting.popitem(last=False)
            future = futures.popleft()
            if futures:
                self._waiting[tenant] = futures
            if not future.done():
                return future
        return None

    def _give(self, helper: _Helper) -> None:
        if (future := self._next_waiting()) is not None:
            future.set_result(helper)
            return
        self._idle.append(helper)

    async def _work(self, helper: _Helper, job: Job, patience_s: float, cpu_s: float) -> tuple[str, Any] | None:
        """The answer; None where the helper was lost."""
        late = asyncio.get_running_loop().call_later(patience_s, self._is_late, helper)
        try:
            answer = await helper.do(job, cpu_s)
        except OSError as error:
            if helper in self._helpers and await asyncio.to_thread(lambda: helper.out_of_time):
                self._stopped(helper, job[0], cpu_s)
                return TOO_MUCH, None
            self._lost(helper, error)
            return None
        except BaseException:  # cancelled with the loop: what is on the socket is anybody's guess
            self._lost(helper, None)
            raise
        finally:
            late.cancel()
            self._late.discard(helper)
        self.failures = 0
        if helper in self._helpers:
            self._give(helper)
        return answer

    def _stopped(self, helper: _Helper, what: str, cpu_s: float) -> None:
        """Its job was too much; the helper is not to blame, and another comes in its place."""
        log.warning("helper_stopped", job=what, cpu_s=round(cpu_s, 1))
        self._helpers.discard(helper)
        helper.end()
        self._start()
        self._give_up()

    def _is_late(self, helper: _Helper) -> None:
        log.warning("helper_late", pid=helper.pid)
        self._late.add(helper)
        self._give_up()

    @property
    def _hope(self) -> bool:
        """Whether a helper may come free soon."""
        return self._starting or bool(self._helpers - self._late)

    def _lost(self, helper: _Helper, error: OSError | None) -> None:
        if helper not in self._helpers:
            return
        self._helpers.discard(helper)
        helper.end()
        if error is not None:
            self._failed(error)

    def _failed(self, error: Exception) -> None:
        self.failures += 1
        self._failed_at = time.monotonic()
        log.warning("helper_lost", error=str(error), started_again=self.failures < MAX_FAILURES)
        self._give_up()

    def _give_up(self) -> None:
        """Who waits does the work itself, where no helper is there and none comes."""
        while not self._hope and (future := self._next_waiting()) is not None:
            future.set_result(None)

    def _start(self) -> None:
        hopeless = self.failures >= MAX_FAILURES and time.monotonic() < self._failed_at + RETRY_S
        wanted = len(self._helpers) < self._size and not hopeless
        if wanted and not (self._starting or self._closed):
            self._starting = True
            self._spawn(self._begin())

    async def _begin(self) -> None:
        """Start one helper, then the next: a start holds the loop up for a moment, so they are all started early."""
        try:
            helper = await asyncio.to_thread(_Helper, self._setup)
            try:
                await helper.do(_NOTHING, CPU_S)  # until it has made what it serves
            except BaseException:  # cancelled too: a helper that nobody knows would stay for ever
                helper.end()
                raise
        except OSError as error:
            self._starting = False
            self._failed(error)
            return
        except BaseException:  # no thread to be had, or the loop's end
            self._starting = False
            self._give_up()
            raise
        put_last(helper.pid)  # not before: a start that gets no core would hold up whoever waits for it
        self._starting = False
        if self._closed:
            helper.end()
            self._give_up()
            return
        self._helpers.add(helper)
        self._give(helper)
        self._start()

    def _spawn(self, work: Any) -> asyncio.Task[Any]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task


async def _patiently(work: asyncio.Task[Any], helper: _Helper, patience_s: float) -> bool:
    """Wait for a job as long as its helper gets on with it. Whether it is done."""
    used_s = helper.cpu_s()
    while True:
        done, _ = await asyncio.wait({work}, timeout=patience_s)
        if done:
            return True
        before_s, used_s = used_s, helper.cpu_s()
        if used_s - before_s < LEAST_SHARE * patience_s:
            return False


def _result(what: str, value: Any) -> Any:
    if what == OK:
        return value
    if what == REFUSED:
        assert isinstance(value, CallError)
        raise value
    raise TooMuchCpu if what == TOO_MUCH else Lost(value)


def _end_all(helpers: set[_Helper]) -> None:
    while helpers:
        helpers.pop().end()
