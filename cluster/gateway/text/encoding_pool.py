"""Long prompts become token ids in processes of their own, so that the gateway's event loop never waits for them.

Problem: in a thread of the gateway, rendering and tokenizing 200 KB holds the interpreter for milliseconds at a time,
and the loop waits for it after every system call; with many such threads that adds up to a quarter of a second.
Helpers (pool_helper.py) start with the first long prompt, which waits for the first of them (0.2 to 0.6 s, once), run
only where nothing else wants to, and leave after a while without work. Where none can be had, or one gets no core for
seconds, the caller does the work itself: `run` gives None.

A core on which only such a process runs counts as idle for whoever wakes up; with a merely nice one there, the loop
waits on the other core behind whatever runs there, 15 to 30 ms at a time. Each is a session of its own, since where
Linux shares the processors by session (autogroup, its default outside of control groups), a gateway whose helpers
keep one core busy would have used up its share by that.
"""

from __future__ import annotations

import asyncio
import os
import pickle
import socket
import subprocess
import sys
import weakref
from array import array
from collections import deque
from contextlib import suppress
from typing import Any, Final

import structlog

from cluster.api.bundle import Bundle
from cluster.gateway.text.pool_wire import FAILED, HEAD
from cluster.observe.background import put_behind, put_last

log = structlog.get_logger("text")

MAX_HELPERS: Final = 4
MAX_FAILURES: Final = 3
"""Helpers lost one after the other, none of which did any work, before no more are started."""
PATIENCE_S: Final = 2.0
"""A helper that has not answered after so long, and a second more for each megabyte, gets no core, or hangs: its
caller does the work itself, and no other waits for it until it has answered."""
Job = tuple[str, tuple[Any, ...], dict[str, Any]]
"""Name of a TextModel's method that gives an array of ids, its arguments and its keyword arguments."""

_NOTHING: Final[Job] = ("prompt_ids", ("", ""), {})


class _Helper:
    """One process and the socket to it, which carries one job at a time."""

    def __init__(self, bundle: Bundle) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "cluster.gateway.text.pool_helper"],
                stdin=theirs.fileno(),
                stdout=subprocess.DEVNULL,
                start_new_session=True,
                env=os.environ | {"TOKENIZERS_PARALLELISM": "false"},  # the helpers are the parallelism
            )
        put_behind(self._process.pid)
        self._socket = ours
        self._busy = self._ended = False
        packed = bundle.pack()
        try:
            ours.sendall(HEAD.pack(len(packed)) + packed)
        except OSError:
            self.end()
            raise
        ours.setblocking(False)

    @property
    def pid(self) -> int:
        """The process."""
        return self._process.pid

    async def ids(self, job: bytes) -> array[int] | None:
        """A job's ids; None where the job itself failed. Raises OSError when the helper is gone."""
        loop = asyncio.get_running_loop()
        self._busy = True
        try:
            await loop.sock_sendall(self._socket, HEAD.pack(len(job)) + job)
            (size,) = HEAD.unpack(await self._exactly(loop, HEAD.size))
            if size == FAILED:
                return None
            ids = array("I")
            ids.frombytes(await self._exactly(loop, size))
            return ids
        finally:
            self._busy = False
            if self._ended:
                self._socket.close()

    async def _exactly(self, loop: asyncio.AbstractEventLoop, size: int) -> bytearray:
        data = bytearray(size)
        view = memoryview(data)
        while view:
            count = await loop.sock_recv_into(self._socket, view)
            if not count:
                raise ConnectionResetError("the helper has closed its socket")
            view = view[count:]
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


class EncodingPool:
    """The helpers of one model. Used from one event loop."""

    def __init__(self, bundle: Bundle, size: int | None = None, patience_s: float = PATIENCE_S) -> None:
        """`size`: helpers at most; by default as many as there are cores, up to MAX_HELPERS."""
        self._bundle = bundle
        self._patience_s = patience_s
        self._size = size or min(os.cpu_count() or 1, MAX_HELPERS)
        self._helpers: set[_Helper] = set()
        self._idle: list[_Helper] = []
        self._late: set[_Helper] = set()
        self._waiting: deque[asyncio.Future[_Helper | None]] = deque()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._starting = False
        self.failures = 0
        """Helpers lost since one did some work."""
        self._closed = False
        self._end = weakref.finalize(self, _end_all, self._helpers)

    @property
    def pids(self) -> frozenset[int]:
        """Of the helpers that are there."""
        return frozenset(helper.pid for helper in self._helpers)

    async def run(self, job: Job) -> array[int] | None:
        """The job's ids; None where no helper can be had in time, or the job failed: do it yourself."""
        packed = pickle.dumps(job, protocol=5)
        helper = await self._take()
        if helper is None:
            return None
        # A job that nobody waits for any longer is finished all the same: its answer must leave the socket.
        patience_s = self._patience_s + len(packed) / 1e6
        work: asyncio.Task[array[int] | None] = self._spawn(self._work(helper, packed, patience_s))
        done, _ = await asyncio.wait({work}, timeout=patience_s)
        return work.result() if done else None

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

    async def _take(self) -> _Helper | None:
        if self._idle:
            return self._idle.pop()
        self._start()
        if not self._hope:
            return None
        future: asyncio.Future[_Helper | None] = asyncio.get_running_loop().create_future()
        self._waiting.append(future)
        try:
            return await future
        except asyncio.CancelledError:
            if future.done() and not future.cancelled() and (helper := future.result()) is not None:
                self._give(helper)
            raise

    def _give(self, helper: _Helper) -> None:
        while self._waiting:
            future = self._waiting.popleft()
            if not future.done():
                future.set_result(helper)
                return
        self._idle.append(helper)

    async def _work(self, helper: _Helper, job: bytes, patience_s: float) -> array[int] | None:
        late = asyncio.get_running_loop().call_later(patience_s, self._is_late, helper)
        try:
            ids = await helper.ids(job)
        except OSError as error:
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
        return ids

    def _is_late(self, helper: _Helper) -> None:
        log.warning("encoding_helper_late", pid=helper.pid)
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
        log.warning("encoding_helper_lost", error=str(error), started_again=self.failures < MAX_FAILURES)
        self._give_up()

    def _give_up(self) -> None:
        """Who waits does the work itself, where no helper is there and none comes."""
        while self._waiting and not self._hope:
            future = self._waiting.popleft()
            if not future.done():
                future.set_result(None)

    def _start(self) -> None:
        wanted = len(self._helpers) < self._size and self.failures < MAX_FAILURES
        if wanted and not (self._starting or self._closed):
            self._starting = True
            self._spawn(self._begin())

    async def _begin(self) -> None:
        """Start one helper, then the next: a start holds the loop up for a moment, so they are all started early."""
        try:
            helper = await asyncio.to_thread(_Helper, self._bundle)
            try:
                await helper.ids(pickle.dumps(_NOTHING, protocol=5))  # until it has read the tokenizer
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


def _end_all(helpers: set[_Helper]) -> None:
    while helpers:
        helpers.pop().end()
