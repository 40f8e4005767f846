"""The other gateway processes of this host, reached over their link ports (apis/admin/siblings.py)."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Sequence
from typing import Any, Final

import orjson
from google.protobuf.wrappers_pb2 import BytesValue

from cluster.gateway.apis.admin.siblings import CONSOLE, Siblings
from cluster.gateway.console.parts import Part
from cluster.gateway.console.peers import FIRST_ANSWER_S, Answer, Columns, PeerParts, Question

IDLE_S: Final = 3.0


class SiblingPeers:
    """The other processes of this host. Implements Peers."""

    def __init__(self, siblings: Siblings, clock: Callable[[], float] = time.monotonic) -> None:
        self._siblings = siblings
        self._clock = clock
        self._parts = PeerParts()
        self._asking: asyncio.Task[None] | None = None
        self._looked_at = float("-inf")

    def start(self) -> None:
        """See Peers. The link port answers, once it is open."""

    async def parts(self, now: float) -> Sequence[Part]:
        """See Peers. The next answers are asked for here and used at the next look, except at the first look."""
        is_first = now - self._looked_at > IDLE_S
        self._looked_at = now
        if self._asking is None or self._asking.done():
            needs_all = is_first or self._parts.needs_all(now)
            self._asking = asyncio.create_task(self._ask(needs_all))
        if is_first:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(FIRST_ANSWER_S):
                    await asyncio.shield(self._asking)
        return self._parts.current(self._clock())

    async def _ask(self, needs_all: bool) -> None:
        for part in await self._answers({"kind": "part", "has_all": needs_all}):
            self._parts.put(part, self._clock())

    async def history(self, query: Question) -> Sequence[Columns]:
        """See Peers."""
        return await self._answers({"kind": "history", "query": query})

    async def _answers(self, question: Question) -> Sequence[dict[str, Any]]:
        answers, _ = await self._siblings.ask(CONSOLE, BytesValue(value=orjson.dumps(question)))
        return [orjson.loads(answer.value) for answer in answers if answer.value]

    async def close(self) -> None:
        """See Peers."""
        if self._asking is not None:
            self._asking.cancel()
            await asyncio.gather(self._asking, return_exceptions=True)
        await self._siblings.close()


def sibling_answer(answer: Answer) -> Callable[[BytesValue], Any]:
    """Return the function that answers a sibling's question."""

    async def respond(request: BytesValue) -> BytesValue:
        found = await answer(orjson.loads(request.value))
        return BytesValue(value=b"" if found is None else orjson.dumps(found))

    return respond
