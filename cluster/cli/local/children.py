"""Child processes of a local cluster. A child writes its output to a log file, and is restarted after it has died."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import sys
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path

FIRST_PAUSE_S = 0.5
LONGEST_PAUSE_S = 30.0
HEALTHY_S = 60.0


class StartFailed(Exception):
    """Error: the cluster did not start. The message names the part, the reason and the log."""


def headrace_command(*arguments: object) -> list[str]:
    """Return the command line that runs a command of `headrace` with this Python."""
    return [sys.executable, "-m", "cluster.cli.main", *map(str, arguments)]


class Backoff:
    """Pause before a restart. The pause doubles each time the process ends, up to `longest_s`.

    After the process has lived for HEALTHY_S seconds, the pause is `first_s` again.
    """

    def __init__(self, first_s: float = FIRST_PAUSE_S, longest_s: float = LONGEST_PAUSE_S) -> None:
        self._first_s = first_s
        self._longest_s = longest_s
        self._next_s = first_s

    def after(self, lived_s: float) -> float:
        """Return the pause in seconds before the restart of a process that has lived for `lived_s` seconds."""
        if lived_s >= HEALTHY_S:
            self._next_s = self._first_s
        pause = self._next_s
        self._next_s = min(self._next_s * 2, self._longest_s)
        return pause


class Child:
    """A child process. After the process has ended, the child can be started again."""

    def __init__(self, name: str, command: Sequence[str], environment: Mapping[str, str], log_file: Path) -> None:
        self.name = name
        self._command = command
        self._environment = environment
        self.log_file = log_file
        self._process: asyncio.subprocess.Process | None = None

    def __repr__(self) -> str:
        return f"Child({self.name}, pid {self.pid})"

    @property
    def pid(self) -> int | None:
        """The process id, or None while the process does not run."""
        return self._process.pid if self._process is not None and self._process.returncode is None else None

    async def start(self, arguments: Sequence[str] = (), environment: Mapping[str, str] | None = None) -> None:
        """Start the process in a session of its own, so that Ctrl-C in the terminal reaches only the supervisor.

        `arguments` and `environment` are added to the arguments and environment given to the constructor.
        """
        with self.log_file.open("ab") as log:
            self._process = await asyncio.create_subprocess_exec(
                *self._command,
                *arguments,
                env={**self._environment, **(environment or {})},
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    async def wait(self) -> int:
        """Wait for the end of the process. Returns the exit code, or minus the number of the signal that ended it.

        Raises RuntimeError if the process was never started.
        """
        if self._process is None:
            raise RuntimeError(f"{self.name} was never started")
        return await self._process.wait()

    async def stop(self, grace_s: float) -> None:
        """Send SIGTERM to the process. After `grace_s` seconds, send SIGKILL.

        Does nothing if the process does not run.
        """
        process = self._process
        if process is None or process.returncode is not None:
            return
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(signal.SIGTERM)
        try:
            async with asyncio.timeout(grace_s):
                await process.wait()
        except TimeoutError:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()

    def log_tail(self, lines: int = 12) -> str:
        """Return the last lines of the log, indented. The result is empty if the log cannot be read."""
        try:
            text = self.log_file.read_text(errors="replace")
        except OSError:
            return ""
        return "\n".join(f"    {line[:400]}" for line in text.splitlines()[-lines:])


async def keep_alive(
    child: Child,
    restart: Callable[[], Awaitable[None]],
    report: Callable[[str], None],
    backoff: Backoff | None = None,
) -> None:
    """Call `restart` whenever the child's process has ended. Runs until cancelled.

    Before each restart, `report` is called with a message about the end, and the pause of `backoff` passes.
    """
    backoff = backoff or Backoff()
    clock = asyncio.get_running_loop().time
    while True:
        began = clock()
        code = await child.wait()
        pause_s = backoff.after(clock() - began)
        how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        report(f"{child.name} ended ({how}); starting it again in {pause_s:g} s; its log: {child.log_file}")
        await asyncio.sleep(pause_s)
        try:
            await restart()
        except Exception as error:  # after any error, the restart is tried again
            report(f"{child.name} did not start: {error}")
