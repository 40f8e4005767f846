"""Log fields that describe a worker: its id, node, pod and GPU type. Their names begin with `worker`, because the
fields `pod` and `node` of the same log line describe the gateway."""

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
