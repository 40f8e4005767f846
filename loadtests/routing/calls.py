"""Calls of the scenario, and the measurements of each call."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from cluster.policy.kv_cache.prefix_hashes import Hashes, prefix_hashes, seed_of

BLOCK_TOKENS = 512
"""Tokens in a KV block, as in Mooncake's traces."""


@dataclass(frozen=True, eq=False)
class Prompt:
    """One call to make, described by the lengths and the blocks of its prompt and output.

    `blocks`: one number for each whole block, in place of the block's text. Equal numbers after equal blocks mean
    equal text. The first `prompt_tokens // BLOCK_TOKENS` blocks belong to the prompt. The blocks of the output
    follow them if a later prompt can contain this output. For the hashes, each block counts as one token, which is
    faster and changes nothing else.
    """

    tenant: str
    prompt_tokens: int
    output_tokens: int
    blocks: Sequence[int]
    adapter: str = ""
    """The adapter that the call names; "" for the base model. Adapters share no blocks."""

    @cached_property
    def hashes(self) -> Hashes:
        """Prefix hashes of the blocks that may be found in a cache. The block of the last prompt token is left out,
        because that token is always computed."""
        return self._all[: self.reusable]

    @property
    def stored_hashes(self) -> Hashes:
        """Prefix hashes of all whole blocks of the prompt, which its worker will hold."""
        return self._all[: self.whole]

    @cached_property
    def names(self) -> list[int]:
        """Names of all blocks, by which the simulated caches identify the blocks."""
        return [int(value) for value in self._all]

    @property
    def reusable(self) -> int:
        """Number of blocks that may be found in a cache."""
        return (self.prompt_tokens - 1) // BLOCK_TOKENS

    @property
    def whole(self) -> int:
        """Number of whole blocks of the prompt."""
        return min(self.prompt_tokens // BLOCK_TOKENS, len(self.blocks))

    @property
    def total(self) -> int:
        """Number of blocks for prompt and output. The last block may be partial."""
        return math.ceil((self.prompt_tokens + self.output_tokens) / BLOCK_TOKENS)

    @cached_property
    def _all(self) -> Hashes:
        return prefix_hashes(self.blocks, 1, seed_of(self.tenant, self.adapter))


@dataclass(eq=False, slots=True)
class RoutedCall:
    """State of a simulated call. Times are in virtual seconds, -1 before the event.

    Four attributes count the tokens of the call's prompt that were found in a cache. `predicted`: tokens that the
    gateway expected in the chosen worker's cache. `cached`: tokens that the engine found in the chosen worker's cache.
    `pooled`: tokens found in a PooledLru, one LRU cache as large as all workers' caches together. `in_pool`: tokens
    found in one large BlockCache that repeats the cache operations of all workers.

    `ends`: how often the call has ended.
    """

    call_id: str
    prompt: Prompt
    gateway: int
    arrived: float
    on_end: Callable[[RoutedCall], None] | None = field(default=None, repr=False)
    bound: float = -1.0
    first: float = -1.0
    ended: float = -1.0
    worker: int = -1
    second: int = -1
    """The other worker while a call is hedged."""
    predicted: int = 0
    cached: int = 0
    pooled: int = 0
    in_pool: int = 0
    generated: int = 0
    answered_by: set[int] = field(default_factory=set)
    """The workers whose first token the gateway has used. If there are two, both would be billed."""
    was_hedged: bool = False
    prefix: int | None = None
    """Hash of the longest prefix that a worker held when the call was last looked up."""
    reason: str = ""

    @property
    def ttft_s(self) -> float:
        """Time to first token in seconds."""
        return self.first - self.arrived
