"""Log fields that describe a worker and its place. In the same log lines of a gateway, the fields `pod` and `node`
describe the place of the gateway."""

from __future__ import annotations

from cluster.api.types import WorkerIdentity


def worker_fields(worker: WorkerIdentity) -> dict[str, str]:
    """Return log fields with the worker's id and node, and with its pod and GPU type if they are known."""
    fields = {"worker": worker.worker_id, "worker_node": worker.host or worker.node}
    if worker.pod:
        fields["worker_pod"] = worker.pod
    if worker.gpu:
        fields["worker_gpu"] = worker.gpu
    return fields
