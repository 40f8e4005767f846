"""The state of the screen of `headrace top`, and how each pressed key changes it. Everything is pure except for the
class Keyboard and the function `keyboard`, which read the terminal."""

from __future__ import annotations

import contextlib
import os
import select
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import TextIO

from cluster.cli.top.views import VIEWS, View

MAX_FILTER = 64
ESCAPE, ENTER = "\x1b", ("\r", "\n")
ERASE = ("\x7f", "\b")
HELP = (
    ("1 to 5, tab", "the view: fleet, workers, calls, tenants, scaling"),
    ("s, r", "sort by the next column; reverse the order"),
    ("/", "show rows that contain a text; Esc removes the filter"),
    ("j, k, arrows", "scroll"),
    ("space", "pause and go on"),
    ("?", "this help"),
    ("q", "quit"),
)
_ARROWS = {"\x1b[A": "k", "\x1b[B": "j", "\x1bOA": "k", "\x1bOB": "j", "\x1b[5~": "K", "\x1b[6~": "J"}


@dataclass(frozen=True, slots=True)
class TopState:
    """State of the screen. `sorts`: for each view, the index of the sort column and whether the order is ascending.

    `wanted`: the applied filter. `typed`: the filter that the user is typing, or None. `top`: index of the first row
    shown.
    """

    view: int = 0
    sorts: tuple[tuple[int, bool], ...] = field(default=tuple((view.sort, view.is_rising) for view in VIEWS))
    wanted: str = ""
    typed: str | None = None
    top: int = 0
    is_helping: bool = False
    is_paused: bool = False
    is_over: bool = False

    @property
    def page(self) -> View:
        """The view that is shown."""
        return VIEWS[self.view]

    @property
    def sort(self) -> tuple[int, bool]:
        """Index of the sort column of the shown view, and whether the order is ascending."""
        return self.sorts[self.view]


def pressed(state: TopState, key: str) -> TopState:
    """Return the state after a key. An unknown key changes nothing."""
    if state.typed is not None:
        return _typing(state, state.typed, key)
    if state.is_helping:
        return replace(state, is_helping=False, is_over=key == "q")
    key = _ARROWS.get(key, key)
    if key == "q":
        return replace(state, is_over=True)
    if key == "?":
        return replace(state, is_helping=True)
    if key == "\t":
        return replace(state, view=(state.view + 1) % len(VIEWS), top=0)
    if key.isdecimal() and key.isascii() and 1 <= int(key) <= len(VIEWS):
        return replace(state, view=int(key) - 1, top=0)
    if key == "/":
        return replace(state, typed=state.wanted)
    if key == ESCAPE:
        return replace(state, wanted="", top=0)
    if key == " ":
        return replace(state, is_paused=not state.is_paused)
    if key in "sr":
        at, is_rising = state.sort
        columns = state.page.columns
        order = ((at + 1) % len(columns), True) if key == "s" else (at, not is_rising)
        return replace(state, sorts=(*state.sorts[: state.view], order, *state.sorts[state.view + 1 :]), top=0)
    if key in "jkJK":
        return replace(state, top=max(state.top + {"j": 1, "k": -1, "J": 10, "K": -10}[key], 0))
    return state


def _typing(state: TopState, typed: str, key: str) -> TopState:
    """Return the state after a key that is pressed while the user types a filter. `typed`: the filter so far."""
    if key in ENTER:
        return replace(state, wanted=typed, typed=None, top=0)
    if key == ESCAPE:
        return replace(state, typed=None)
    if key in ERASE:
        return replace(state, typed=typed[:-1])
    return replace(state, typed=(typed + key)[:MAX_FILTER]) if key.isprintable() else state


def split_keys(text: str) -> list[str]:
    """Split the input of a terminal into keys. An escape sequence is one key."""
    keys, at = [], 0
    while at < len(text):
        if text[at] == ESCAPE and text[at + 1 : at + 2] in ("[", "O"):
            end = at + 2
            while end < len(text) and not ("@" <= text[end] <= "~"):
                end += 1
            keys.append(text[at : end + 1])
            at = end + 1
        else:
            keys.append(text[at])
            at += 1
    return keys


class Keyboard:
    """The keys of a terminal, read without waiting for the end of a line."""

    def __init__(self, source: TextIO) -> None:
        self._source = source

    def read(self, timeout_s: float) -> list[str]:
        """Wait for keys, at most `timeout_s` seconds. Returns the keys that were pressed."""
        ready, _, _ = select.select([self._source], [], [], timeout_s)
        if not ready:
            return []
        data = os.read(self._source.fileno(), 1024)
        return split_keys(data.decode(errors="ignore")) if data else ["q"]  # the terminal is gone


@contextlib.contextmanager
def keyboard(source: TextIO = sys.stdin) -> Iterator[Keyboard | None]:
    """Read single keys from a terminal, and restore its settings at the end. Yields None if `source` is no terminal."""
    if not source.isatty():
        yield None
        return
    import termios
    import tty

    before = termios.tcgetattr(source)
    try:
        tty.setcbreak(source)
        yield Keyboard(source)
    finally:
        termios.tcsetattr(source, termios.TCSADRAIN, before)
