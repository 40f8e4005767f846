"""Why an engine did not come up: vLLM's processes log it, and their owner is told only that one of them has ended.

Each of them (watchdog.watch) writes the error that it logs as it fails into the folder of the sockets, which the owner
reads. The first one counts: where a rank fails, its core fails after it, and says less. A rank on another host has no
such folder; what it raised is in its core's error, with which Ray or vLLM's queue has brought it.
"""

from __future__ import annotations

import contextlib
import logging
import os

from cluster.engine import sockets

NAME = "cause"
LONGEST = 500
"""Characters of an error that are told."""
TRACEBACK = "Traceback (most recent call last):"
LOGGERS = ("vllm.v1.engine.core", "vllm.v1.executor")
"""Who logs that a core or a rank has failed."""


class _Keeper(logging.Handler):
    """Writes the first error that is logged with its exception."""

    def emit(self, record: logging.LogRecord) -> None:
        folder = sockets.folder()
        error = record.exc_info[1] if record.exc_info else None
        if error is None or folder is None:
            return
        with contextlib.suppress(OSError), (folder / NAME).open("x", encoding="utf-8", errors="replace") as file:
            file.write(text(error))


def text(error: BaseException) -> str:
    """The error on one line; of an error that another process has sent with its traceback, that process's."""
    told = f"{type(error).__name__}: {error}"  # without notes: vLLM's ranks add their traceback as one
    if TRACEBACK in told:
        sent = told.rpartition(TRACEBACK)[2].splitlines()[1:]
        begin = next((at for at, line in enumerate(sent) if line.strip() and not line.startswith(" ")), 0)
        told = "\n".join(sent[begin:]) or told
    return " ".join(told.split())[:LONGEST]


def keep() -> None:
    """In each of vLLM's processes but the owner: note why it fails. Idempotent."""
    for name in LOGGERS:
        logger = logging.getLogger(name)
        if not any(isinstance(one, _Keeper) for one in logger.handlers):
            logger.addHandler(_Keeper(logging.ERROR))


def take() -> str:
    """What the engine of this process that has not come up died of, and forget it; empty where nothing was noted."""
    folder = sockets.folder()
    if folder is None:
        return ""
    try:
        found = (folder / NAME).read_text(encoding="utf-8")
        os.unlink(folder / NAME)
    except OSError:
        return ""
    return found
