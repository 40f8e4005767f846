"""Coalescing of tokens within a tool call, for parsers that read the whole tool call again for each token.

Such a parser takes O(n) time per token, so a tool call with thousands of tokens would take seconds. Once a tool call is
long, its parser gets several tokens at a time. Their number grows with the tool call, so that the time per token stays
constant. Invariant: where a parse happens depends only on the tokens so far, never on how the engine's steps delivered
them. So the parts of an output are the same on another worker, which replays the tokens in other groups.
"""

from __future__ import annotations

from dataclasses import dataclass

LONG_CALL = 256
"""Number of tokens of a tool call from which its tokens are coalesced."""
PARSES_A_DOUBLING = 64
"""Minimum number of parses while a call's length doubles."""

COALESCED = frozenset(
    {
        "deepseek_v3",
        "glm45",
        "glm47",
        "granite",
        "hermes",
        "hunyuan_a13b",
        "internlm",
        "jamba",
        "lfm2",
        "llama3_json",
        "llama4_json",
        "llama4_pythonic",
        "minimax_m2",
        "pythonic",
        "qwen3_coder",
        "qwen3_json",
        "qwen3_xml",
        "seed_oss",
        "step3p5",
    }
)
"""Parsers of tool calls whose joined parts stay the same if they get several tokens of a call at a time.

One exception: Llama's arguments lag behind the tokens, so a long call that max_tokens cuts may end some characters
earlier.
"""
REPLAYED_TOGETHER = frozenset(
    {
        "deepseek_v32",
        "glm45",
        "glm47",
        "hermes",
        "internlm",
        "kimi_k2",
        "minimax_m2",
        "mistral",
        "qwen3_coder",
        "qwen3_json",
        "qwen3_xml",
        "seed_oss",
        "step3p5",
    }
)
"""Parsers of tool calls whose joined parts stay the same if they get several tokens of any kind at a time."""


@dataclass(slots=True)
class Coalescing:
    """Rule by which a session decides when to parse the tokens of one output: after every token, but in a long tool
    call only from time to time. `long_call`: length in tokens from which a tool call is long; 0 to parse after every
    token."""

    long_call: int = LONG_CALL
    _began: int = -1
    """Position at which the latest tool call began; -1 outside a call."""

    def is_due(self, position: int) -> bool:
        """Return whether the tokens up to `position` must be parsed now.

        Positions count from the output's first token.
        """
        length = position - self._began
        if self._began < 0 or not self.long_call or length < self.long_call:
            return True
        return position % (1 << (max(length // PARSES_A_DOUBLING, 1).bit_length() - 1)) == 0

    def record(self, position: int, *, in_call: bool) -> None:
        """Record that the tokens up to `position` are parsed. `in_call`: whether they end within a tool call."""
        if not in_call:
            self._began = -1
        elif self._began < 0:
            self._began = position
