"""One link of a worker with a gateway: its Submits by slot, the blobs of its bulk stream, and its tasks."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from dataclasses import dataclass, field

from cluster.link.v1 import link_pb2 as pb
from cluster.wire.bulk import Prompts
from cluster.wire.dial import HeartbeatSender
from cluster.wire.outbox import Outbox


@dataclass(eq=False, slots=True)
class LinkState:
    """A link that is up. An abort that arrives while its Submit is in progress is kept until the Submit finishes."""

    number: int
    credit_order: int
    """Position in the order in which links share capacity. The first links get the remainder of the division."""
    gateway: str
    incarnation: str
    """Incarnation of the gateway."""
    outbox: Outbox
    heartbeats: HeartbeatSender
    requests: dict[int, str] = field(default_factory=dict)
    """Engine request ids by slot."""
    prompts: Prompts = field(default_factory=Prompts)
    blobs: asyncio.Queue[pb.Blob] = field(default_factory=lambda: asyncio.Queue(maxsize=64))
    tasks: set[asyncio.Task[None]] = field(default_factory=set)
    _submitting: set[int] = field(default_factory=set)
    _aborted: set[int] = field(default_factory=set)

    def begin_submit(self, slot: int, request_id: str) -> None:
        """Record a Submit that is in progress until `finish_submit` or `refuse`."""
        self.requests[slot] = request_id
        self._submitting.add(slot)

    def finish_submit(self, slot: int) -> bool:
        """Finish a Submit; return whether an abort arrived while it was in progress."""
        self._submitting.discard(slot)
        if slot not in self._aborted:
            return False
        self._aborted.discard(slot)
        return True

    def is_submitting(self, slot: int) -> bool:
        """Return whether the slot's Submit is in progress."""
        return slot in self._submitting

    def request_to_abort(self, slot: int) -> str | None:
        """Return the engine request id to abort now.

        None: the Submit is in progress, or the request ended while the abort was on its way.
        """
        if slot in self._submitting:
            self._aborted.add(slot)
            return None
        return self.requests.get(slot)

    def refuse(self, slot: int, reason: str, message: str, field_name: str = "") -> None:
        """Forget a Submit and report to the gateway that it is refused."""
        self.requests.pop(slot, None)
        self._submitting.discard(slot)
        self._aborted.discard(slot)
        self.outbox.refused(slot, reason, message, field_name)

    def spawn(self, work: Coroutine[None, None, None]) -> None:
        """Run a task of this link, which the end of the link cancels."""
        task = asyncio.create_task(work)
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)
