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
    """The parsers of a model, by their names in vLLM; "" for none."""

    tools: str = ""
    reasoning: str = ""

    def __bool__(self) -> bool:
        return bool(self.tools or self.reasoning)

    @property
    def leave_text_unchanged(self) -> bool:
        """Whether an answer to a request without tools is the output's unchanged text, so that it needs no parsing."""
        return not self.reasoning and self.tools in LEAVE_TEXT_UNCHANGED

    @property
    def values(self) -> tuple[str, str]:
        """Return the names in the order of cluster.config.engine.PARSER_KEYS."""
        return self.tools, self.reasoning

    @property
    def capabilities(self) -> tuple[str, ...]:
        """The capabilities of a worker with these parsers, e.g. `tools:hermes`."""
        words = ((TOOL_PARSER, self.tools), (REASONING_PARSER, self.reasoning))
        return tuple(prefix + name for prefix, name in words if name)


class OutputParsers(Protocol):
    """Interface of the parser of a worker's outputs.

    `open` begins a session for a request that has the field `parsing`, before the engine gets the request. The session
    lasts until `close`. `divert` takes the request's outputs out of each step's outputs, and `parsed` later returns
    them, parsed and in order.
    """

    async def run(self) -> None:
        """Parse outputs until cancelled."""

    async def open(self, request: EngineRequest) -> EngineRequest:
        """Open a session for a request with `parsing`; return the request with the grammar that its tools require.
        The grammar of a request without `parsing` applies from the first token.

        If nothing needs to be parsed, no session is opened, and the returned request has no `parsing`. Raises
        EngineRefused if the request cannot be parsed.
        """

    def divert(self, outputs: Sequence[TokenOutput]) -> tuple[Sequence[TokenOutput], Sequence[TokenOutput]]:
        """Divide a step's outputs: return the outputs that need no parsing, and the outputs that will be parsed.

        `parsed` later returns the outputs of the second kind.
        """

    async def parsed(self) -> Sequence[TokenOutput]:
        """Wait for parsed outputs; return them. Each output has the field `parsed`. If parsing its request failed,
        the output has `finish` ERROR and a `message` instead.

        If an output contains a stop string, it is the request's last output. It then has `finish` STOP, and no
        tokens after the stop string.
        """

    def close(self, request_id: str) -> None:
        """End a request's session. Outputs that are not parsed yet are dropped. An unknown id is ignored."""


class NoParsers:
    """The implementation of OutputParsers for a worker without parsers.

    It removes `parsing` from requests, and refuses requests that need tools.
    """

    async def run(self) -> None:
        """Wait until cancelled."""
        await asyncio.Event().wait()

    async def open(self, request: EngineRequest) -> EngineRequest:
        """Return the request without `parsing`. Raises EngineRefused if the request needs tools."""
        refuse_tools(request)
        return replace(request, parsing=None)

    def divert(self, outputs: Sequence[TokenOutput]) -> tuple[Sequence[TokenOutput], Sequence[TokenOutput]]:
        """Return all outputs as outputs that need no parsing."""
        return outputs, ()

    async def parsed(self) -> Sequence[TokenOutput]:
        """Wait until cancelled."""
        await asyncio.Event().wait()
        return ()

    def close(self, request_id: str) -> None:
        """Do nothing, since there are no sessions."""


def refuse_tools(request: EngineRequest) -> None:
    """Raise EngineRefused if the request needs a parser for tool calls."""
    if request.parsing is not None and request.parsing.needs_tools:
        raise EngineRefused(Outcome.UNSUPPORTED_FEATURE.name, f"tools: {NO_TOOLS}", "tools")
