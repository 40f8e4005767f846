"""A gateway's scheduler with real calls and real links, whose workers are played by a test."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from cluster.api.outcomes import CallError
from cluster.api.types import EngineInfo, WorkerIdentity
from cluster.gateway.calls.call import Call
from cluster.gateway.links.liveness import LinkLiveness
from cluster.gateway.links.worker_link import WorkerLink
from cluster.gateway.models.directory import ModelDirectory
from cluster.gateway.scheduling.scheduler import Scheduler
from cluster.gateway.scheduling.worker_events import WorkerEvents
from cluster.wire.bundle import Bundle

INFO = EngineInfo("float32", "sim", "0", 16, 1000, 8, 2048, 4096, 32_000)


@dataclass
class PlainText:
    """A stand-in for a text source. It records token ids and makes no text."""

    token_ids: list[int] = field(default_factory=list)
    searches_text: bool = False
    refused: bool = False
    pending_chars: int = 0

    def pending_tokens(self) -> int:
        """Return 0, since this text source never holds tokens back."""
        return 0

    def push(self, token_ids: Sequence[int], stop_terminated: bool = False) -> str | None:
        """Record the tokens."""
        self.token_ids.extend(token_ids)
        return None

    def text_of(self, token_id: int) -> str:
        """Record the token and return no text."""
        self.token_ids.append(token_id)
        return ""

    def push_back(self, text: str) -> None:
        """Do nothing."""

    def pop_text(self, finished: bool) -> str:
        """Return no text."""
        return ""

    def restore(self, token_ids: Sequence[int], chars: int) -> None:
        """Keep the tokens."""
        self.token_ids.extend(token_ids)


class Host:
    """The scheduler's view of a gateway. Implements SchedulerHost."""

    accounting = None

    def __init__(self) -> None:
        self.directory = ModelDirectory(Path("/nonexistent"), self._fetch)

    async def _fetch(self, digest: str) -> Bundle:
        raise NotImplementedError

    def gateway_count(self) -> int:
        """Return the number of gateways, which is unknown here."""
        return 0

    def model_unserved(self) -> None:
        """Do nothing."""

    def state_changed(self) -> None:
        """Do nothing."""

    def claimed_calls(self, model: str) -> Sequence[tuple[str, int]]:
        """Return no calls, since none was resumed here."""
        return ()


def linked_worker(
    events: WorkerEvents, name: str, serial: Iterator[int], *, weights: str = "weights", info: EngineInfo = INFO
) -> WorkerLink:
    """Connect a worker of the model `m`, which has no credit yet. `serial`: numbers, of which none is used twice."""
    identity = WorkerIdentity(name, f"{name}-{next(serial)}", "m", weight_digest=weights, node=name)
    link = WorkerLink(identity, info, next(serial), events, LinkLiveness(0.0, 1.0, 1.0))
    events.link_up(link)
    return link


def enters(scheduler: Scheduler, call: Call) -> bool:
    """Queue the sequences of a call to the model `m`; return False if the waiting room is full."""
    model = scheduler.host.directory.find("m")
    assert model is not None
    try:
        scheduler.enter(call, model)
    except CallError:
        return False
    return True
