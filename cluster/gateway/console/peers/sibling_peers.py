"""Access to the other gateway processes of this host. They are reached over their link ports, by
apis/admin/siblings.py."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Sequence
from typing import Any, Final

from google.protobuf.wrappers_pb2 import BytesValue

from cluster.gateway.apis.admin.siblings import CONSOLE, Siblings
from cluster.gateway.console.overview.parts import Part
from cluster.gateway.console.peers.peers import (
    FIRST_ANSWER_S,
    Answer,
    Columns,
    PartAssembler,
    PeerParts,
    Question,
    pieces_of,
)

IDLE_S: Final = 3.0


class SiblingPeers:
    """Access to the other gateway processes of this host, for the console's data. Implements Peers."""

    def __init__(self, siblings: Siblings, clock: Callable[[], float] = time.monotonic) -> None:
        self._siblings = siblings
        self._clock = clock
        self._parts = PeerParts()
        self._asking: asyncio.Task[None] | None = None
        self._looked_at = float("-inf")

    def start(self) -> None:
        """Do nothing, since the link port answers questions as soon as the port is open. Implements Peers."""

    async def parts(self, now: float) -> Sequence[Part]:
        """Ask the other processes for their newest parts of the console's overview, and return the parts that
        have already arrived.

        Only the first call, or the first after IDLE_S without a call, waits for the answers, for at most
        FIRST_ANSWER_S.
        """
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
        import orjson  # not at the start of the process: deferred_imports.py

        for lines in await self._answers({"kind": "part", "has_all": needs_all}):
            assembler = PartAssembler()
            for line in lines:
                with contextlib.suppress(ValueError, KeyError, TypeError, AttributeError):  # of another release
                    part = assembler.add("", 0, orjson.loads(line))
                    if part is not None:
                        self._parts.put(part, self._clock())
                await asyncio.sleep(0)

    async def history(self, query: Question) -> Sequence[Columns]:
        """Return the other processes' columns for a query of the history. Implements Peers."""
        import orjson

        answers = await self._answers({"kind": "history", "query": query})
        return [orjson.loads(line) for lines in answers for line in lines]

    async def _answers(self, question: Question) -> Sequence[Sequence[bytes]]:
        import orjson

        answers, _ = await self._siblings.ask(CONSOLE, BytesValue(value=orjson.dumps(question)))
        return [answer.value.splitlines() for answer in answers]

    async def close(self) -> None:
        """Stop requesting data, and close the connections to the other processes. Implements Peers."""
        if self._asking is not None:
            self._asking.cancel()
            await asyncio.gather(self._asking, return_exceptions=True)
        await self._siblings.close()


def sibling_answer(answer: Answer) -> Callable[[BytesValue], Any]:
    """Return a function that answers requests for console data from the other gateway processes of this host. The
    function passes each request to `answer`, and returns the result as JSON lines, one for each piece of the result."""

    async def respond(request: BytesValue) -> BytesValue:
        import orjson

        question = orjson.loads(request.value)
        found = await answer(question)
        lines = []
        for piece in () if found is None else pieces_of(dict(found)) if question["kind"] == "part" else [found]:
            lines.append(orjson.dumps(piece))
            await asyncio.sleep(0)
        return BytesValue(value=b"\n".join(lines))

    return respond
