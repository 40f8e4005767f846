"""The handlers of a kept logger stay open when logging is configured again."""

from __future__ import annotations

import logging
import logging.config
import logging.handlers
from pathlib import Path

from cluster.observe import log


def test_a_kept_logger_outlives_dict_config(tmp_path: Path) -> None:
    """After dictConfig, a logger passed to `keep_handlers_open` still writes through a memory handler to a file, as in
    Ray Serve; the handlers of other loggers are closed."""
    loggers = [logging.getLogger(name) for name in ("test.kept", "test.not_kept")]
    buffers = []
    for logger in loggers:
        target = logging.FileHandler(tmp_path / logger.name)
        buffers.append(logging.handlers.MemoryHandler(100, target=target))
        logger.addHandler(buffers[-1])
    kept, other = buffers
    log.keep_handlers_open(loggers[0])
    logging.config.dictConfig({"version": 1, "disable_existing_loggers": False})
    assert (kept.target is None, other.target is None) == (False, True)
    loggers[0].error("still written")
    kept.flush()
    assert "still written" in (tmp_path / "test.kept").read_text()
    for logger, buffer in zip(loggers, buffers, strict=True):
        logger.removeHandler(buffer)
