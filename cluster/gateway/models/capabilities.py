"""The capabilities of one model. They are taken from the reports of the linked workers. While no worker is linked, they
are taken from the report of the last worker and from the catalog."""

from __future__ import annotations

from collections.abc import Mapping

from cluster.api.pooling import PoolingInfo, PoolingTask, pooling_tasks
from cluster.api.types import CatalogEntry, EngineInfo
from cluster.gateway.links.worker_link import WorkerLink


class ModelCapabilities:
    """The parsers, pooling tasks and context length of one model."""

    def __init__(self, entry: CatalogEntry, links: Mapping[str, WorkerLink]) -> None:
        """Create the capabilities of a model that has no workers yet. `links`: mapping that will have the links of the
        model's workers. The caller must add a link to this mapping before it calls `joined`, and remove a link before
        it calls `left`."""
        self._entry = entry
        self._links = links
        self.parsers: frozenset[str] = frozenset()
        """The kinds of parsers that any linked worker has: TOOL_PARSER, REASONING_PARSER. Kept here because each call
        reads them, and a model may have a thousand workers."""
        self._linked_tasks: frozenset[PoolingTask] = frozenset()
        """The pooling tasks that any linked worker has, kept here for the same reason as `parsers`."""
        self.last_info: EngineInfo | None = None
        """Engine info of the last worker that left. While no worker is linked, `tasks` and `pooling` are taken from
        this info. The context length and the sampling defaults are taken from it only if the catalog lacks them."""

    def update(self, entry: CatalogEntry) -> None:
        """Apply a new catalog entry."""
        self._entry = entry

    def joined(self, link: WorkerLink) -> None:
        """Add the capabilities of a new worker."""
        self.parsers |= link.parsers
        self._linked_tasks |= link.tasks

    def left(self, link: WorkerLink) -> None:
        """Remove the capabilities that only a departed worker had. If no worker remains, the engine info of the last
        worker is kept."""
        self.parsers = frozenset().union(*(other.parsers for other in self._links.values()))
        self._linked_tasks = frozenset().union(*(other.tasks for other in self._links.values()))
        if not self._links:
            self.last_info = link.info

    @property
    def tasks(self) -> frozenset[PoolingTask] | None:
        """Pooling tasks of the model: those of the linked workers, else those of the last worker, else those in the
        catalog. Empty for a model that generates tokens. None if there was no worker yet and the catalog has neither
        tasks nor an engine class."""
        if self._links:
            return self._linked_tasks
        if self.last_info is not None:
            return frozenset(pooling_tasks(self.last_info.capabilities))
        return frozenset(self._entry.tasks) if self._entry.tasks or self._entry.engine_class else None

    @property
    def pooling(self) -> PoolingInfo | None:
        """Pooling tasks and vector lengths of the model, as one of its workers reports them; None while they are
        unknown."""
        infos = (link.info for link in self._links.values())
        last = () if self.last_info is None else (self.last_info,)
        return next((info.pooling for info in (*infos, *last) if info.pooling is not None), None)

    @property
    def max_model_len(self) -> int:
        """Context length of the model in tokens; 0 if unknown. It is the smallest length that a worker reports, so that
        a call fits every worker.

        Workers that do not report a length are ignored."""
        lengths = [length for link in self._links.values() if (length := link.info.max_model_len)]
        if lengths:
            return min(lengths)
        return self._entry.max_model_len or (self.last_info.max_model_len if self.last_info is not None else 0)
