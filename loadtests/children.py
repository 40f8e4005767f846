"""Child processes of a scenario. Each child runs on loopback, in its own process group and with its own log, and ends
with the scenario.

A child ends its whole group when its standard input closes, so no process remains even if the harness is killed.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil

_GUARD = """
exec 3<&0
"$@" </dev/null 3<&- &
command=$!
{ read -r _ <&3; kill -KILL 0; } &
wait $command
code=$?
kill $!
exit $code
"""
TERM_S = 10.0
ROOT = Path(__file__).resolve().parent.parent
KILLED_S = 60.0
"""Time in seconds that a killed process may take to disappear."""


class DidNotStart(Exception):
    """Raised for a child that ended, or was not ready in time. The message holds the end of the child's log."""


@dataclass(eq=False)
class Child:
    """A started process with all its descendants."""

    name: str
    kind: str
    process: subprocess.Popen[bytes]
    log: Path
    term_s: float = TERM_S
    family: set[tuple[int, float]] = field(default_factory=set)
    _stopping: asyncio.Task[None] | None = None

    @property
    def pid(self) -> int:
        """Process id of the guard process, which is the root of the process tree."""
        return self.process.pid

    def tail(self, lines: int = 25) -> str:
        """Return the last lines of the child's log."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])

    @property
    def alive(self) -> bool:
        """Whether the started command still runs. A guard process, which is the parent of the command, may run
        longer."""
        return self.process.poll() is None

    def commands(self) -> list[psutil.Process]:
        """Return the command's own processes, without the guard process."""
        try:
            return [p for p in psutil.Process(self.pid).children() if _GUARD not in p.cmdline()]
        except psutil.NoSuchProcess:
            return []

    async def until(self, ready: Callable[[], Awaitable[bool]], what: str, timeout_s: float) -> None:
        """Wait until `ready` is true. Raises DidNotStart if the child ends or the time runs out first."""
        deadline = time.monotonic() + timeout_s
        while not await ready():
            why = "ended" if not self.alive else "was not ready in time" if time.monotonic() > deadline else ""
            if why and not await ready():  # a program may have become ready and ended between the two checks
                raise DidNotStart(f"{self.name} {why} ({what}); its log ends:\n{self.tail()}")
            await asyncio.sleep(0.05)

    async def stop(self) -> None:
        """End the child and its descendants: by SIGTERM first, then by SIGKILL. Idempotent; completes even when
        cancelled.
        """
        if self._stopping is None:
            self._stopping = asyncio.create_task(self._stop())
        await asyncio.shield(self._stopping)

    async def _stop(self) -> None:
        self._remember()
        for command in self.commands():  # do not signal the guard: when the guard ends, the whole group ends at once
            with contextlib.suppress(psutil.NoSuchProcess):
                command.send_signal(signal.SIGTERM)
        deadline = time.monotonic() + self.term_s
        while self._living() and time.monotonic() < deadline:  # noqa: ASYNC110 - another process's end is no event
            await asyncio.sleep(0.05)
        for member in self._living():
            with contextlib.suppress(psutil.NoSuchProcess):
                member.kill()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        if self.process.stdin is not None:
            self.process.stdin.close()
        await asyncio.to_thread(self.process.wait)
        deadline = time.monotonic() + KILLED_S  # SIGKILL is sent but not yet delivered when kill returns
        while self._living() and time.monotonic() < deadline:  # noqa: ASYNC110 - another process's end is no event
            await asyncio.sleep(0.01)

    def _remember(self) -> None:
        try:
            for member in psutil.Process(self.pid).children(recursive=True):
                self.family.add((member.pid, member.create_time()))
        except psutil.NoSuchProcess:
            return

    def _living(self) -> list[psutil.Process]:
        self._remember()
        living = []
        for pid, created in self.family:
            try:
                member = psutil.Process(pid)
                if member.create_time() == created and member.status() != psutil.STATUS_ZOMBIE:
                    living.append(member)
            except psutil.NoSuchProcess:
                continue
        return living


class Children:
    """All children of a scenario. Leaving the context ends the children."""

    def __init__(self, folder: Path, term_s: float = TERM_S) -> None:
        """Create an empty set of children. `folder`: folder for the logs. `term_s`: seconds that each child has to exit
        by itself after SIGTERM at the end."""
        self.folder = folder
        self.term_s = term_s
        self.started: list[Child] = []
        self._temporary: tempfile.TemporaryDirectory[str] | None = None

    async def __aenter__(self) -> Children:
        self.folder.mkdir(parents=True, exist_ok=True)
        return self

    async def __aexit__(self, *_: object) -> None:
        await asyncio.gather(*(child.stop() for child in reversed(self.started)))
        if self._temporary is not None:
            self._temporary.cleanup()

    @property
    def temporary(self) -> str:
        """Folder for temporary files of those children that do not remove their files. The folder is removed when all
        children have ended."""
        if self._temporary is None:
            self._temporary = tempfile.TemporaryDirectory(prefix="headrace-peers-", ignore_cleanup_errors=True)
        return self._temporary.name

    def start(
        self,
        name: str,
        kind: str,
        command: Sequence[str],
        environment: Mapping[str, str] | None = None,
        checkout: Path = ROOT,
    ) -> Child:
        """Start `command` with its output in `<name>.log`. `kind`: class under which the CPU time of the child is
        counted; `checkout`: source tree from which the command imports `cluster` and `loadtests`.
        """
        taken = sum(1 for child in self.started if child.name == name)
        log = self.folder / (f"{name}-{taken + 1}.log" if taken else f"{name}.log")
        with log.open("wb") as output:
            process = subprocess.Popen(
                ["bash", "-c", _GUARD, "guard", *command],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                cwd=checkout,
                env={**os.environ, "PYTHONPATH": str(checkout), **(environment or {})},
            )
        child = Child(name, kind, process, log, self.term_s)
        self.started.append(child)
        return child
