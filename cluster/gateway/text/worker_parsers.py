"""Check that all workers of a sequence parse its output with the same parsers."""

from __future__ import annotations

from collections.abc import Iterable

from cluster.api.types import PARSER_KINDS, TOOL_PARSER


class WorkerParsers:
    """The parsers of the worker that began to parse an output. Different parsers could split the same tokens into
    different parts, so the output may continue only on a worker with the same parsers."""

    __slots__ = ("_capabilities",)

    def __init__(self) -> None:
        self._capabilities: tuple[str, ...] = ()
        """Those capabilities of the worker that name a parser; empty if the worker does not parse the output."""

    def accept(self, capabilities: Iterable[str], is_parsed: bool) -> bool:
        """Return whether a worker has the same parsers as the earlier workers of the output. If no earlier worker has
        begun to parse the output, record the parsers of this worker and return True. `capabilities`: the worker's
        capabilities; empty if the worker does not parse the output. `is_parsed`: whether an earlier worker has begun to
        parse the output."""
        parsers = tuple(word for word in capabilities if word.startswith(PARSER_KINDS))
        if not is_parsed:
            self._capabilities = parsers
        return parsers == self._capabilities

    @property
    def tool_parser(self) -> str:
        """Name in vLLM of the parser of tool calls; "" if there is none."""
        return next((word.removeprefix(TOOL_PARSER) for word in self._capabilities if word.startswith(TOOL_PARSER)), "")
