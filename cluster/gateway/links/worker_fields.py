"""Fields of a gateway's log lines that name a worker and its place. `pod` and `node` are the gateway's own."""

from __future__ import annotations

from cluster.api.types import WorkerIdentity


def worker_fields(worker: WorkerIdentity) -> dict[str, str]:
    """Return the worker's id, its node, and as far as it has them its pod and its type of GPU."""
    fields = {"worker": worker.worker_id, "worker_node": worker.host or worker.node}
    if worker.pod:
        fields["worker_pod"] = worker.pod
    if worker.gpu:
        fields["worker_gpu"] = worker.gpu
    return fields
