"""The workers that are still starting and cannot serve calls. Each of them reports the progress of its start to the
gateway (Link.Starting)."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from cluster.link.v1 import link_pb2 as pb

MAX_STARTING = 1000
"""Maximum number of starting workers that a gateway keeps. Reports of further workers are dropped."""
MAX_CHARS = 256


@dataclass(frozen=True, slots=True)
class StartingWorker:
    """A starting worker: its id, model and place, and how many bytes of its weights are fetched."""

    worker_id: str
    model: str
    pod: str
    node: str
    gpu: str
    fetched_bytes: int
    total_bytes: int
    bytes_per_s: float


class StartingWorkers:
    """The starting workers of one gateway, keyed by the number of the stream on which each worker sends its reports.
    One worker may have two streams: after a restart, its first report may arrive before the old stream has ended."""

    def __init__(self) -> None:
        self._numbers = itertools.count()
        self._workers: dict[int, StartingWorker] = {}

    def new_stream(self) -> int:
        """Return an unused number for a new stream."""
        return next(self._numbers)

    def report(self, stream: int, message: pb.StartingWorker) -> None:
        """Record the report of a starting worker. `stream`: the stream on which the report arrived. Raises ValueError
        for a report that cannot be exported as metrics."""
        if not message.worker_id or not message.model:
            raise ValueError("worker_id and model must not be empty")
        texts = (message.worker_id, message.model, message.pod, message.host, message.gpu)
        if max(map(len, texts)) > MAX_CHARS:
            raise ValueError(f"worker_id, model, pod, host and gpu must not exceed {MAX_CHARS} characters")
        if not (math.isfinite(message.bytes_per_s) and message.bytes_per_s >= 0):
            raise ValueError("bytes_per_s must be a finite number, at least 0")
        if len(self._workers) < MAX_STARTING or stream in self._workers:
            self._workers[stream] = StartingWorker(
                *texts, message.fetched_bytes, message.total_bytes, message.bytes_per_s
            )

    def end(self, stream: int) -> None:
        """Forget the worker of a stream."""
        self._workers.pop(stream, None)

    @property
    def current(self) -> Sequence[StartingWorker]:
        """The newest report of each worker."""
        return list({worker.worker_id: worker for worker in list(self._workers.values())}.values())
