"""Why an engine did not come up: vLLM's processes log it, and their owner is told only that one of them has ended.

Each of them (watchdog.watch) writes the error that it logs as it fails into the folder of the sockets, which the owner
reads. The first one counts: where a rank fails, its core fails after it, and says less. A rank on another host has no
such folder; what it raised is in its core's error, which Ray has carried there.
"""

from __future__ import annotations

import contextlib
import logging
import os
import traceback

from cluster.engine import sockets

NAME = "cause"
LONGEST = 500
"""Characters of an error that are told."""
LOGGERS = ("vllm.v1.engine.core", "vllm.v1.executor")
"""Who logs that a core or a rank has failed."""


class _Keeper(logging.Handler):
    """Writes the first error that is logged with its exception."""

    def emit(self, record: logging.LogRecord) -> None:
        folder = sockets.folder()
        error = record.exc_info[1] if record.exc_info else None
        if error is None or folder is None:
            return
        with contextlib.suppress(OSError), (folder / NAME).open("x", encoding="utf-8") as file:
            file.write(text(error))


def text(error: BaseException) -> str:
    """The error on one line; of an error that another process has sent with its traceback, that process's."""
    lines = "".join(traceback.format_exception_only(error)).strip().splitlines()
    told = lines[-1:] if any("Traceback (most recent call last)" in line for line in lines) else lines
    return " ".join(" ".join(told).split())[:LONGEST]


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
