"""The gateway's side of a helper process: the process, and the socket on which jobs and answers are sent."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Final

from cluster.gateway.helpers import wire
from cluster.gateway.helpers.wire import HEAD, OUT_OF_TIME, PIECE_BYTES, SIZE, Job
from cluster.process.background import lower_priority

_ENVIRONMENT: Final = {
    "TOKENIZERS_PARALLELISM": "false",  # the helpers already run in parallel
    # Freed memory is kept for the next body. Getting fresh memory takes a third of the time for a body of 16 MB.
    "MALLOC_MMAP_THRESHOLD_": str(64 << 20),
    "MALLOC_TRIM_THRESHOLD_": str(128 << 20),
}
Setup = Callable[[], tuple[str, bytes]]
"""A function that returns the kind of object that the helpers serve, and the data to create such an object."""
_NOTHING: Final[Job] = ("__repr__", (), {})


class HelperProcess:
    """A helper process, and the socket to it. A helper runs one job at a time."""

    def __init__(self, setup: Setup) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "cluster.gateway.helpers.process"],
                stdin=theirs.fileno(),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,  # only panic traces; errors are sent as answers
                start_new_session=True,
                env=os.environ | _ENVIRONMENT,
            )
        lower_priority(self._process.pid)
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
        """Id of the helper process."""
        return self._process.pid

    def cpu_s(self) -> float:
        """Return the CPU seconds that the process has used so far; 0 if the time cannot be read."""
        # Linux's id of a process's CPU clock (clock_getcpuclockid(3)). /proc takes a hundred times as long to read.
        with suppress(OSError):
            return time.clock_gettime(~self.pid << 3 | 2)
        return 0.0

    @property
    def out_of_time(self) -> bool:
        """Whether the process ended because its job exceeded the CPU limit. Reading the property waits up to 0.1 s for
        the process to end."""
        with suppress(subprocess.TimeoutExpired):
            return self._process.wait(0.1) == -OUT_OF_TIME
        return False

    async def do(self, job: Job, cpu_s: float) -> tuple[str, Any]:
        """Run a job and return the answer of the process. `cpu_s`: CPU seconds that the job may use. Raises OSError if
        the process has ended."""
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
        """Kill the process at once; a helper has no state to save."""
        self._ended = True
        if self._busy:  # if closed now, a new socket could reuse the file descriptor that the loop still waits for
            with suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)
        else:
            self._socket.close()
        self._process.kill()
        self._process.wait()


async def start_helper(setup: Setup, cpu_s: float) -> HelperProcess:
    """Start a helper, wait until it is ready for jobs, and return it. `cpu_s`: CPU limit of a small job, in seconds.
    Raises OSError if the process does not start or has ended."""
    helper = await asyncio.to_thread(HelperProcess, setup)
    try:
        await helper.do(_NOTHING, cpu_s)
    except BaseException:  # also when cancelled, or the unregistered process would stay forever
        helper.end()
        raise
    return helper
