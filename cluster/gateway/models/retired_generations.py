"""The deployment generations of one model that the catalog has retired, and the compatibility keys of their departed
workers. A sequence can resume only on a worker with a compatible key."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final, TypeVar

from cluster.api.types import CompatibilityKey
from cluster.gateway.links.worker_link import WorkerLink

_T = TypeVar("_T")

MAX_REMEMBERED: Final = 64
"""Upper bound, for each model, on the remembered retired generations and on the remembered compatibility keys of
departed workers."""


class RetiredGenerations:
    """The deployment generations of one model that the catalog has retired. They show which sequences can no longer
    resume and must end."""

    def __init__(self) -> None:
        self._retired: dict[str, None] = {}
        """Deployment generations of workers (WorkerIdentity.generation) that the catalog has retired, oldest first."""
        self._departed: dict[CompatibilityKey, None] = {}
        """Compatibility keys of departed workers whose generation was retired, oldest first."""

    def update(self, retired: Iterable[str], links: Iterable[WorkerLink]) -> None:
        """Remember the generations in `retired`, which a new catalog retires. Forget a generation that is in use again
        because its replacement was rolled back: the new catalog does not retire it, and one of its workers takes new
        requests. `links`: the links of the model's workers."""
        retired = tuple(retired)
        _remember(self._retired, *retired)
        for link in links:
            if link.takes_new_requests and link.identity.generation not in retired:
                self._retired.pop(link.identity.generation, None)

    def joined(self, link: WorkerLink) -> None:
        """Record that a worker has joined. Sequences with the worker's compatibility key can resume on it, so the key
        is removed from the remembered keys of departed workers."""
        self._departed.pop(link.compatibility_key, None)

    def left(self, link: WorkerLink) -> None:
        """Remember the compatibility key of a worker that has left, if the worker's deployment generation was
        retired."""
        if link.identity.generation in self._retired:
            _remember(self._departed, link.compatibility_key)

    def had_compatible(self, key: CompatibilityKey) -> bool:
        """Return whether a sequence with this key could have resumed on a retired worker that has left."""
        return any(departed.can_resume(key) for departed in self._departed)


def _remember(past: dict[_T, None], *items: _T) -> None:
    """Append items to `past`, or move known items to its end. Forget the oldest items beyond MAX_REMEMBERED."""
    for item in items:
        past.pop(item, None)
        past[item] = None
    for oldest in list(past)[:-MAX_REMEMBERED]:
        del past[oldest]
