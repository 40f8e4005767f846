"""The interface between the load driver and the clients of the protocols: a client sends a request, receives pieces of
text, and at the end returns the token counts that the server reported."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

OnText = Callable[[str], None]
"""Callback that gets every non-empty piece of text immediately, in order."""


@dataclass(frozen=True, slots=True)
class Request:
    """A call. `key` names the content of the request, so that the answers of two servers to the same request can be
    compared.
    """

    key: str
    prompt: str
    max_tokens: int
    chat: bool = True
    """Whether the prompt is a user's message. Otherwise the prompt is plain text to be continued."""
    group: str = ""
    """Group of the dataset that the request belongs to (a tenant, a shared prefix), for the report."""
    model: str = ""
    """Name of the model or adapter; "" for the client's model."""


@dataclass(frozen=True, slots=True)
class Answer:
    """End of a call. Token counts are those that the server reported (usage); None if the server reported none."""

    completion_tokens: int | None
    prompt_tokens: int | None = None
    cached_tokens: int | None = None
    finish_reason: str = ""


class CallFailed(Exception):
    """Raised for a call without a complete answer. `kind`: word under which the error is counted; `message`: error
    text.
    """

    UNREACHABLE = "unreachable"
    BROKEN = "broken"
    TIMEOUT = "timeout"
    PROTOCOL = "protocol"

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(f"{kind}: {message}")
        self.kind = kind
        self.message = message

    @property
    def fatal(self) -> bool:
        """Whether the server itself seems to be gone, as opposed to having refused this call."""
        return self.kind in (self.UNREACHABLE, self.BROKEN)


class Face(Protocol):
    """Client of a protocol. One object serves any number of calls at once, on one event loop."""

    name: str

    async def run(self, request: Request, on_text: OnText) -> Answer:
        """Make a call and return its answer at the end. Raises CallFailed. Cancelling this method also cancels the call
        at the server.
        """

    async def close(self) -> None:
        """Close all connections."""
