"""A model's pooling tasks reach all gateways: a worker names them in its Hello message, the worker's gateway reports
them to the controller, and the controller publishes them in the catalog."""

from __future__ import annotations

from cluster.api.pooling import PoolingTask
from cluster.api.types import CatalogEntry, EngineInfo, ModelState, WorkerIdentity
from cluster.controller.links import _worker
from cluster.gateway.links.controller import worker_to_pb
from cluster.gateway.links.liveness import LinkLiveness
from cluster.gateway.links.worker_link import WorkerLink
from cluster.gateway.models.known_model import KnownModel
from cluster.link.v1 import link_pb2 as pb
from cluster.wire.codecs import codec
from tests.support.links import NoListener

BOTH = (PoolingTask.EMBED, PoolingTask.SCORE)


def link_of(*capabilities: str) -> WorkerLink:
    """Return the link of a worker with these capabilities."""
    identity = WorkerIdentity("w", "i", "m")
    info = EngineInfo("c", "p", "v", 16, 10, 8, 512, 64, 100, {}, capabilities=capabilities)
    return WorkerLink(identity, info, 1, NoListener(), LinkLiveness(0.0, 1.0, 1.0))


def test_a_report_has_the_tasks() -> None:
    """A gateway reports to the controller which pooling tasks (`embed`, `score`) its workers offer. Tasks that this
    release does not know are left out."""
    message = worker_to_pb(link_of("pools:embed", "pools:score", "pools:sing", "resume:exact"))
    assert _worker(pb.FleetWorker.FromString(message.SerializeToString())).tasks == BOTH
    message.tasks.append("sing")
    assert _worker(message).tasks == BOTH
    assert _worker(worker_to_pb(link_of("resume:exact"))).tasks == ()


def test_an_entry_keeps_the_tasks() -> None:
    """A catalog entry that is encoded and decoded keeps its tasks. Names that a release does not know are left out."""
    entry = CatalogEntry("m", state=ModelState.READY, tasks=BOTH)
    assert codec.entry_from_pb(codec.entry_to_pb(entry)) == entry
    message = codec.entry_to_pb(entry)
    message.tasks.append("sing")
    assert codec.entry_from_pb(message) == entry


def test_workers_override_the_catalog() -> None:
    """The pooling tasks of a model are those that its linked workers report.

    After the last worker has left, the reported tasks stay. If no worker was ever linked, the tasks come from the
    catalog entry; they are None if the entry is incomplete.
    """
    model = KnownModel(CatalogEntry("m"), True)
    unknown = model.capabilities.tasks
    assert unknown is None
    model.update(CatalogEntry("m", engine_class="c", tasks=(PoolingTask.SCORE,)))
    assert model.capabilities.tasks == frozenset({PoolingTask.SCORE})
    link = link_of("pools:embed")
    model.add_link(link)
    assert model.capabilities.tasks == frozenset({PoolingTask.EMBED})
    model.remove_link(link, ModelState.LOADING)
    assert model.capabilities.tasks == frozenset({PoolingTask.EMBED})
    assert KnownModel(CatalogEntry("m", engine_class="c"), True).capabilities.tasks == frozenset(), (
        "its workers generate"
    )
