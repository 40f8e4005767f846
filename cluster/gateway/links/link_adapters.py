"""The adapters (LoRA weights) of one worker: those that the gateway wants on the worker, and the states that the worker
reports."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace

from cluster.api.adapters import AdapterSpec, AdapterState, AdapterStatus
from cluster.link.v1 import link_pb2 as pb
from cluster.wire.codecs.adapter_codec import AdapterSet, adapter_report_from_pb, adapter_set_to_pb


class LinkAdapters:
    """The adapters of one link's worker."""

    def __init__(
        self,
        *,
        supported: bool,
        send: Callable[[pb.AdapterSet], None],
        mark_changed: Callable[[], None],
        states_changed: Callable[[], None],
    ) -> None:
        """`supported`: whether the worker can load adapters. `send`: sends the wanted adapters to the worker.
        `mark_changed`: called when routing must read the adapters again. `states_changed`: called after `mark_changed`
        if the worker's adapters, their digests or their states have changed, but not if an adapter has only entered or
        left a slot of the engine."""
        self.supported = supported
        """Whether the worker loads the adapters that its gateways send."""
        self.statuses: Mapping[str, AdapterStatus] = {}
        """The worker's last report: the status of each adapter, keyed by the adapter's name."""
        self.ready_count = 0
        """Number of adapters in the report that are READY."""
        self._send = send
        self._mark_changed = mark_changed
        self._states_changed = states_changed
        self._sent: tuple[AdapterSpec, ...] | None = None
        self._revision_sent = 0
        self._has_reported = False

    def send(self, revision: int, adapters: tuple[AdapterSpec, ...]) -> None:
        """Send the worker the adapters that it should load, unless the last sent adapters are equal.

        Equal adapters are sent again if the catalog's `revision` is new and the worker reports other adapters,
        because another gateway may have sent the worker an older catalog. Does nothing for a worker that cannot
        load adapters.
        """
        if not self.supported:
            return
        sent = self._sent
        is_known = adapters is sent or adapters == sent
        if not is_known or (revision != self._revision_sent and self._has_others(adapters)):
            self._sent, self._revision_sent = adapters, revision
            self._send(adapter_set_to_pb(AdapterSet(revision, adapters)))

    def _has_others(self, adapters: tuple[AdapterSpec, ...]) -> bool:
        """Return whether the names in the worker's last report differ from the names of `adapters`."""
        if not self._has_reported:
            return False
        return len(adapters) != len(self.statuses) or any(spec.name not in self.statuses for spec in adapters)

    def lose(self, digest: str) -> None:
        """Mark a READY adapter as LOADING until the worker's next report, because the worker has refused a call for the
        adapter."""
        self._set(
            replace(status, state=AdapterState.LOADING)
            if status.digest == digest and status.state is AdapterState.READY
            else status
            for status in self.statuses.values()
        )

    def apply(self, report: pb.AdapterReport) -> bool:
        """Apply a worker's report of its adapters. Returns whether the adapters, their digests or their states have
        changed; a change of the engine's slots alone does not count. Raises ValueError for a report that cannot be
        read. Reports of a worker that cannot load adapters are ignored."""
        return self.supported and self._set(adapter_report_from_pb(report))

    def _set(self, statuses: Iterable[AdapterStatus]) -> bool:
        before = self._known()
        self.statuses, self._has_reported = {status.name: status for status in statuses}, True
        self.ready_count = sum(status.state is AdapterState.READY for status in self.statuses.values())
        self._mark_changed()
        if self._known() == before:
            return False
        self._states_changed()
        return True

    def _known(self) -> Mapping[str, tuple[str, AdapterState, int]]:
        """Return, by adapter name, the parts of the statuses on whose change the gateway acts."""
        return {name: (status.digest, status.state, status.load_number) for name, status in self.statuses.items()}
