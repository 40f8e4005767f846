"""Progress lines of `up`, one line per step.

On a terminal, a line is redrawn in place. Otherwise, a line is written once, at the end of the step.
"""

from __future__ import annotations

import sys
import time

from cluster.cli import terminal
from cluster.cli.terminal import safe

BAR = 20


def duration(seconds: float) -> str:
    """Format a duration as a short text: 0.6 s, 21 s, 1m22s."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    if seconds < 60:
        return f"{seconds:.0f} s"
    return f"{int(seconds) // 60}m{int(seconds) % 60:02d}s"


class StepLine:
    """A progress line, such as `[2/4] model         SmolLM2 ████  15 s`."""

    def __init__(self, number: str, name: str) -> None:
        self._head = f"{number} {name:<13}" if number else f"{name:<13}"
        self._live = sys.stdout.isatty()
        self._shown = ""
        self.started = time.monotonic()

    @property
    def elapsed_s(self) -> float:
        """Seconds since the step began."""
        return time.monotonic() - self.started

    def show(self, text: str, part: float | None = None) -> None:
        """Redraw the line on a terminal. Prints nothing if standard output is no terminal.

        `part`: progress in [0, 1], shown as a bar; None for a line without a bar.
        """
        if self._live:
            bar = "" if part is None else " " + ("█" * int(part * BAR)).ljust(BAR, "·")
            self._write(f"\r\033[K{self._head} {safe(text)}{bar} {duration(self.elapsed_s)}")

    def note(self, text: str) -> None:
        """Print a line that stays on the screen while the step continues."""
        self._write(f"{self._clear()}{self._head} {safe(text)}\n")

    def done(self, text: str) -> None:
        """Print the final form of the line."""
        self._write(f"{self._clear()}{self._head} {safe(text)}\n")

    def _clear(self) -> str:
        return "\r\033[K" if self._live else ""

    def _write(self, text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()


def say(text: str) -> None:
    """Print a line of text that belongs to no step."""
    terminal.say(text)
