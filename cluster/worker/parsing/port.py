"""The interface of a worker's output parser, and the implementation for a worker without parsers."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from cluster.api.outcomes import Outcome
from cluster.api.ports import EngineRefused
from cluster.api.types import REASONING_PARSER, TOOL_PARSER, EngineRequest, TokenOutput

NO_TOOLS = "this worker has no parser for tool calls; set engine.tool_call_parser of the model, or send no tools"


LEAVE_TEXT_UNCHANGED = frozenset(
    {
        "deepseek_v3",
        "deepseek_v31",
        "ernie45",
        "granite4",
        "hermes",
        "hunyuan_a13b",
        "internlm",
        "jamba",
        "lfm2",
        "llama3_json",
        "llama4_json",
        "llama4_pythonic",
        "olmo3",
        "phi4_mini_json",
        "pythonic",
        "qwen3_json",
        "xlam",
    }
)
"""Parsers of tool calls that leave the text of an answer without tools unchanged. All other parsers drop the marks of a
tool call even from such an answer."""


@dataclass(frozen=True, slots=True)
class ParserNames:
    """The parsers of a model by vLLM's names; "" for none."""

    tools: str = ""
    reasoning: str = ""

    def __bool__(self) -> bool:
        return bool(self.tools or self.reasoning)

    @property
    def leave_text_unchanged(self) -> bool:
        """Whether an answer to a request without tools consists of the output's unchanged text and needs no parsing."""
        return not self.reasoning and self.tools in LEAVE_TEXT_UNCHANGED

    @property
    def values(self) -> tuple[str, str]:
        """The names in the order of cluster.config.engine.PARSER_KEYS."""
        return self.tools, self.reasoning

    @property
    def capabilities(self) -> tuple[str, ...]:
        """The capabilities of a worker with these parsers, e.g. `tools:hermes`."""
        words = ((TOOL_PARSER, self.tools), (REASONING_PARSER, self.reasoning))
        return tuple(prefix + name for prefix, name in words if name)


class OutputParsers(Protocol):
    """The parser of a worker's outputs.

    A request with `parsing` is opened before the engine gets it, and then has a session until `close`. The session
    takes the request's outputs from the steps and gives them back parsed, in order.
    """

    async def run(self) -> None:
        """Parse until cancelled."""

    async def open(self, request: EngineRequest) -> EngineRequest:
        """Open a session for a request with `parsing`; return the request with the grammar that its tools require.

        If nothing needs to be parsed, there is no session and the returned request has no `parsing`. Raises
        EngineRefused if the request cannot be parsed.
        """

    def divert(self, outputs: Sequence[TokenOutput]) -> tuple[Sequence[TokenOutput], Sequence[TokenOutput]]:
        """Take the outputs of requests with a session out of a step. Returns the other outputs and the taken outputs.
        `parsed` later returns the taken outputs."""

    async def parsed(self) -> Sequence[TokenOutput]:
        """Wait for parsed outputs. Each has `parsed`, or `finish` ERROR and `message` if its request failed.

        The output that has a stop string is the request's last, has `finish` STOP and no tokens after the stop string.
        """

    def close(self, request_id: str) -> None:
        """End a session. Outputs of the request that are not parsed yet are dropped. Unknown ids are ignored."""


class NoParsers:
    """The output parser of a worker without parsers. It ignores `parsing`, and refuses requests that need tools."""

    async def run(self) -> None:
        """Wait until cancelled."""
        await asyncio.Event().wait()

    async def open(self, request: EngineRequest) -> EngineRequest:
        """Return the request without `parsing`. Raises EngineRefused if the request needs tools."""
        refuse_tools(request)
        return replace(request, parsing=None)

    def divert(self, outputs: Sequence[TokenOutput]) -> tuple[Sequence[TokenOutput], Sequence[TokenOutput]]:
        """Return all outputs as not taken."""
        return outputs, ()

    async def parsed(self) -> Sequence[TokenOutput]:
        """Wait until cancelled."""
        await asyncio.Event().wait()
        return ()

    def close(self, request_id: str) -> None:
        """Do nothing."""


def refuse_tools(request: EngineRequest) -> None:
    """Raise EngineRefused if the request needs a parser for tool calls."""
    if request.parsing is not None and request.parsing.needs_tools:
        raise EngineRefused(Outcome.UNSUPPORTED_FEATURE.name, f"tools: {NO_TOOLS}", "tools")
