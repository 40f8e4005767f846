"""The worker's side of its renderer process: the chats that wait to be rendered, and the replacement of a process that
has ended or hangs.

The process gets one chat at a time. So a chat that is withdrawn while it waits costs nothing. If the process hangs or
ends, it is known which chat has caused this.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

from cluster.worker.parsing import wire
from cluster.worker.parsing.connection import ParserConnection
from cluster.worker.parsing.hangs import HangWatch, cpu_seconds
from cluster.worker.parsing.parser_process import ParserHost
from cluster.worker.parsing.replaced_process import ReplacedProcess

MAX_DEATHS = 2
"""A chat fails when this many processes have ended while they worked on it."""
CPU_LIMIT_S, WALL_LIMIT_S = 10.0, 60.0
"""CPU time and wall time in seconds after which a render counts as hung. A prompt of a million tokens takes seconds."""
_UNSENT = 0


def render_watch(host: ParserHost) -> HangWatch:
    """Return the HangWatch of a renderer's process."""
    return HangWatch(host.progress.read, lambda: cpu_seconds(host.pid), CPU_LIMIT_S, WALL_LIMIT_S)


@dataclass(slots=True, eq=False)
class _Chat:
    """A chat that waits for its prompt."""

    request: wire.Render
    rendered: asyncio.Future[wire.Rendered]
    deaths: int = 0

    def answer(self, rendered: wire.Rendered) -> None:
        if not self.rendered.done():
            self.rendered.set_result(rendered)

    def fail(self, reason: str, field: str = "") -> None:
        self.answer(wire.Rendered(self.request.number, error=reason, field=field))


class PromptRenderer(ReplacedProcess):
    """The renderer of a worker, which makes the prompts of chats. `name`: name of the renderer in families.py."""

    def __init__(
        self, name: str, start: Callable[[], ParserHost], watch: Callable[[ParserHost], HangWatch] = render_watch
    ) -> None:
        """Create the renderer; `run` starts its process.

        `start`: starts a process with the renderer, and blocks until the process exists. `watch`: returns the HangWatch
        of a process.
        """
        super().__init__(start, watch)
        self.name = name
        self._waiting: dict[int, _Chat] = {}
        """The chats by number, oldest first. The process may be working on the first."""
        self._last = 0
        self._in_work = _UNSENT

    @property
    def waiting(self) -> int:
        """Number of chats whose prompts are not made yet."""
        return len(self._waiting)

    async def render(self, chat: bytes, max_tokens: int) -> wire.Rendered:
        """Render a chat, a JSON object with the FIELDS of kit.py; return its prompt, or the reason why it has none.

        Waits until earlier chats are rendered and the process is loaded. If the prompt has more than `max_tokens` ids,
        the ids are left out.
        """
        self._last += 1
        waiting = _Chat(wire.Render(self._last, chat, max_tokens), asyncio.get_running_loop().create_future())
        number = waiting.request.number
        self._waiting[number] = waiting
        try:
            self._send_next()
            return await waiting.rendered
        finally:
            if self._in_work != number:  # otherwise the process must answer this chat before it gets the next
                self._waiting.pop(number, None)

    def _send_next(self) -> None:
        if self._in_work or self._connection is None or not self._connection.is_ready:
            return
        oldest = next(iter(self._waiting.values()), None)
        if oldest is not None:
            self._in_work = oldest.request.number
            self._connection.send(oldest.request)

    def _end_work(self) -> _Chat | None:
        number, self._in_work = self._in_work, _UNSENT
        return self._waiting.pop(number, None)

    # ---- the process

    def _apply(self, connection: ParserConnection, reply: wire.Reply) -> None:
        match reply:
            case wire.Rendered():
                if (chat := self._end_work()) is not None:
                    chat.answer(reply)
                self._send_next()
            case wire.Ready():
                if reply.error:
                    for chat in self._waiting.values():
                        chat.fail(f"the worker's renderer does not start: {reply.error}")
                    raise EOFError(reply.error)
                connection.is_ready = True
                self._send_next()

    def _fail_hung(self, number: int) -> None:
        if number == self._in_work and (chat := self._end_work()) is not None:
            chat.fail("the render takes too long: send a shorter or simpler chat", "messages")

    def _record_death(self, number: int) -> None:
        """Record that the renderer's process has ended while it worked on a chat.

        The next process renders this chat first, with two exceptions. A chat that was withdrawn is dropped. A chat
        on which MAX_DEATHS processes have ended fails.
        """
        in_work = self._in_work
        if not in_work:
            return
        chat = self._waiting[in_work]
        chat.deaths += 1
        if chat.deaths >= MAX_DEATHS:
            self._end_work()
            chat.fail("the model's renderer ended on this chat twice", "messages")
        elif chat.rendered.done():  # withdrawn
            self._end_work()
        self._in_work = _UNSENT
