"""The port between the driver and a protocol: a request goes out, pieces of text come back, counts end it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

OnText = Callable[[str], None]
"""Called at once for every piece of text that is not empty, in order."""


@dataclass(frozen=True, slots=True)
class Request:
    """One call. `key` names its content, so that answers of two servers to the same request can be compared."""

    key: str
    prompt: str
    max_tokens: int
    chat: bool = True
    """The prompt is a user's message; else it is plain text to be continued."""
    group: str = ""
    """Whatever the dataset groups by (a tenant, a shared prefix), for the report."""


@dataclass(frozen=True, slots=True)
class Answer:
    """How a call ended. Token counts are the server's own (usage); None where it told none."""

    completion_tokens: int | None
    prompt_tokens: int | None = None
    cached_tokens: int | None = None
    finish_reason: str = ""


class CallFailed(Exception):
    """A call that brought no whole answer. `kind` is a word to count by, `message` what happened."""

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
        """Whether the server itself seems to be gone, rather than this call refused."""
        return self.kind in (self.UNREACHABLE, self.BROKEN)


class Face(Protocol):
    """A protocol's client. One object serves any number of calls at once, on one event loop."""

    name: str

    async def run(self, request: Request, on_text: OnText) -> Answer:
        """Make the call to its end. Raises CallFailed. A cancelled call is cancelled at the server too."""

    async def close(self) -> None:
        """End all connections."""
