"""A chat renderer for tests of gateways. It needs no vLLM, can refuse chats, and can be paused."""

from __future__ import annotations

import json
import threading
import time
from array import array
from dataclasses import dataclass, field

from cluster.worker.parsing import wire
from cluster.worker.rendering.kit import RendererKit
from cluster.worker.rendering.prompt_renderer import PromptRenderer
from tests.worker.parsing.hosts import thread_host


@dataclass
class ByteKit(RendererKit):
    """A renderer kit whose prompts have one token id for each byte of the chat's JSON.

    `open`: set while the kit may render.
    """

    open: threading.Event = field(default_factory=threading.Event)
    rendered: list[str] = field(default_factory=list)
    """First contents of the chats, in the order in which they were rendered."""

    def render(self, request: wire.Render) -> wire.Rendered:
        """Wait until the kit is open, then render a chat."""
        assert self.open.wait(60)
        content = json.loads(request.chat)["messages"][0]["content"]
        self.rendered.append(content)
        if content.startswith("refuse"):
            return wire.Rendered(request.number, error="is refused", field="messages")
        if content.startswith("slow"):
            time.sleep(0.05)
        ids = array("I", list(request.chat))
        packed = ids.tobytes() if len(ids) <= request.max_tokens else b""
        return wire.Rendered(request.number, packed, len(ids))


def byte_renderer(*, is_open: bool = True) -> tuple[ByteKit, PromptRenderer]:
    """Return a ByteKit, and a renderer that runs this kit in a thread. `is_open`: whether the kit renders at once;
    otherwise it waits until the test sets `open`."""
    kit = ByteKit()
    if is_open:
        kit.open.set()
    return kit, PromptRenderer("deepseek_v32", lambda: thread_host(kit))
