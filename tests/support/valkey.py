"""A real store, Valkey or Redis, for tests."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path

import pytest
from redis.asyncio import Redis
from redis.exceptions import RedisError

from cluster.cli.commands import doctor
from cluster.process.ports import free_port
from tests.support.keyed import eventually

SERVER = doctor.find_tool("valkey-server") or doctor.find_tool("redis-server")


class Server:
    """A store that listens on a free loopback port."""

    def __init__(self, folder: Path) -> None:
        self.port = free_port()
        self._folder = folder
        self._process: asyncio.subprocess.Process | None = None

    @property
    def url(self) -> str:
        """URL of the store."""
        return f"redis://127.0.0.1:{self.port}/0"

    async def start(self) -> None:
        """Start the store and wait until it answers."""
        if SERVER is None:
            pytest.skip(doctor.missing_reason("valkey-server"))
        words = ("--port", str(self.port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no")
        self._process = await asyncio.create_subprocess_exec(
            SERVER, *words, cwd=self._folder, stdout=asyncio.subprocess.DEVNULL
        )

        async def answers() -> bool:
            async with Redis.from_url(self.url) as client:
                try:
                    return bool(await client.ping())
                except RedisError:
                    return False

        await eventually(answers, "the store answers")

    async def stop(self) -> None:
        """Kill the store at once."""
        if self._process is not None and self._process.returncode is None:
            self._process.kill()
            await self._process.wait()

    def freeze(self, on: bool) -> None:
        """Suspend the store's process if `on`, else let it continue.

        A suspended store keeps its connections and answers nothing.
        """
        assert self._process is not None
        os.kill(self._process.pid, signal.SIGSTOP if on else signal.SIGCONT)
