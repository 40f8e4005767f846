"""Events of an engine's prefix cache: which KV blocks it has stored and removed."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

BlockId = Hashable
"""Hash of a block in the engine's own form: bytes or an integer."""


@dataclass(frozen=True, slots=True)
class BlocksStored:
    """Event: the engine has stored consecutive blocks of one sequence.

    `parent`: the block before the first one; None if the first block begins a prompt. `token_ids`: tokens of all of
    these blocks. `cache_salt`: used only if `parent` is None. `adapter`: digest of the adapter, "" for none.
    """

    blocks: Sequence[BlockId]
    parent: BlockId | None
    token_ids: Sequence[int]
    block_size: int
    cache_salt: str = ""
    adapter: str = ""


@dataclass(frozen=True, slots=True)
class BlocksRemoved:
    """Event: the engine has removed one copy of each of these blocks. The engine may still hold further copies."""

    blocks: Sequence[BlockId]


@dataclass(frozen=True, slots=True)
class BlocksCleared:
    """Event: the engine has removed all blocks."""


KvEvent = BlocksStored | BlocksRemoved | BlocksCleared
