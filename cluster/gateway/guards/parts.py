"""Output guards for an output that the worker parses into content, reasoning and tool calls.

Each channel (the content, the reasoning, the arguments of one tool call) is a text of its own: no match spans two
channels. A channel ends when another one begins. Then the guards decide about all of its text and hold back nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from cluster.api.output_parts import OutputPart, PartKind
from cluster.gateway.guards.stream import GuardChain


class GuardedParts:
    """A filter that passes the parsed output of one sequence through a chain of guards. Each channel (content,
    reasoning or the arguments of a tool call) has a chain of its own."""

    def __init__(self, new_chain: Callable[[], GuardChain]) -> None:
        """`new_chain`: returns the guards of a new channel (content, reasoning or the arguments of a tool call)."""
        self._new_chain = new_chain
        self._chain: GuardChain | None = None
        self._channel = OutputPart(PartKind.CONTENT, "")
        self.refused = False

    def feed(self, parts: Sequence[OutputPart], last: bool) -> list[OutputPart]:
        """Add parts of the output. Returns the filtered parts, without text that is still held back. `last`: whether
        the output ends here. A refusal also ends the output: nothing after the refused text is returned."""
        out: list[OutputPart] = []
        for part in parts:
            if self.refused:
                break
            is_name = part.kind is PartKind.TOOL_NAME
            if is_name or (part.kind, part.call) != (self._channel.kind, self._channel.call):
                self._filter("", True, out)
                self._channel = part
            self._filter(part.text, is_name, out)
        if last:
            self._filter("", True, out)
        return out

    def _filter(self, text: str, last: bool, out: list[OutputPart]) -> None:
        """Filter text of the current channel (content, reasoning or the arguments of one tool call), and append the
        result to `out`. `last`: whether the channel ends here."""
        if self.refused or not (text or self._chain):
            return
        self._chain = self._chain or self._new_chain()
        decided, _ = self._chain.feed(text, (), last)
        if decided:
            out.append(OutputPart(self._channel.kind, decided, self._channel.call))
        self.refused = self._chain.refused
        if last:
            self._chain = None
