"""The chats that gateways send to a worker to be rendered, and the worker's answers.

A gateway has at most MAX_OUTSTANDING chats at the worker; the gateway itself keeps the other chats and orders them by
tenant. The worker renders the chats of all gateways in the order of their arrival. So a chat waits for only a few chats
of each other gateway.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from cluster.api.outcomes import Outcome
from cluster.link.v1 import link_pb2 as pb
from cluster.wire.rendering import MAX_CHAT_BYTES, MAX_OUTSTANDING
from cluster.worker.link import Link
from cluster.worker.parsing import wire
from cluster.worker.rendering.prompt_renderer import PromptRenderer

NO_RENDERER = "this worker renders no chats: its model has a chat template, or vLLM could not load its renderer"
TOO_LATE = "the worker did not render the chat in time; retry after the given delay"


@dataclass(frozen=True, slots=True)
class Renders:
    """The chats that a worker is rendering, counted for each link. `renderer`: None for a worker that renders no
    chats."""

    renderer: PromptRenderer | None
    _outstanding: dict[int, int] = field(default_factory=dict)
    """Number of chats of each link that are not answered yet, by the link's number."""

    def accept(self, link: Link, render: pb.Render) -> None:
        """Render a chat in a new task. The chat is refused if too many chats of this link are not answered yet."""
        count = self._outstanding.get(link.number, 0)
        if count >= MAX_OUTSTANDING:
            why = f"at most {MAX_OUTSTANDING} chats of a gateway are rendered at once"
            link.outbox.rendered(pb.Rendered(number=render.number, reason=Outcome.INTERNAL.name, message=why))
            return
        self._outstanding[link.number] = count + 1
        link.spawn(self._render(link, render))

    async def _render(self, link: Link, render: pb.Render) -> None:
        try:
            async with asyncio.timeout(render.timeout_ms / 1000):
                answer = await self._answer(link, render)
        except TimeoutError:
            answer = pb.Rendered(reason=Outcome.SHED.name, message=TOO_LATE)
        finally:
            left = self._outstanding[link.number] - 1
            if left:
                self._outstanding[link.number] = left
            else:
                del self._outstanding[link.number]
        answer.number = render.number
        link.outbox.rendered(answer)

    async def _answer(self, link: Link, render: pb.Render) -> pb.Rendered:
        chat = render.chat
        if render.chat_blob:
            chat = await link.prompts.pop_prompt(render.chat_blob)
        if self.renderer is None:
            return pb.Rendered(reason=Outcome.UNSUPPORTED_FEATURE.name, message=NO_RENDERER)
        if len(chat) > MAX_CHAT_BYTES:
            too_long = f"at most {MAX_CHAT_BYTES} bytes of JSON, got {len(chat)}"
            return pb.Rendered(reason=Outcome.INVALID_FIELD.name, message=too_long, field="messages")
        return _to_pb(await self.renderer.render(chat, render.max_tokens))


def _to_pb(rendered: wire.Rendered) -> pb.Rendered:
    if rendered.error:
        outcome = Outcome.INVALID_FIELD if rendered.field else Outcome.INTERNAL
        return pb.Rendered(reason=outcome.name, message=rendered.error, field=rendered.field)
    return pb.Rendered(token_ids=rendered.ids, tokens=rendered.tokens)
