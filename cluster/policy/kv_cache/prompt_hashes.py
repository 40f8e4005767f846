"""Memory of the prefix hashes of recent prompts. When a conversation continues, only the new blocks are hashed.

Problem. A conversation is sent again with each new message, and hashing 128,000 tokens takes a gateway about a quarter
of a millisecond. Comparing the tokens with those of the previous prompt takes a fraction of that time.

Method. Take the last position in a prompt that is a multiple of STEP. The prompt is remembered under this position and
the 64 tokens before it. A new prompt may continue an earlier prompt of any length, so the last _TRIES multiples of STEP
in the new prompt are looked up, each with the 64 tokens before it. A prompt that is found is compared with the new one
token by token, so the hashes are always right. Memory is bounded by the number of tokens; the oldest prompts are
forgotten first.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from cluster.policy.kv_cache.prefix_hashes import Hashes, Prefix, prefix_hashes

MAX_TOKENS: Final = 4 << 20
"""Largest number of tokens of all remembered prompts, which take about 18 MB."""
STEP: Final = 1024
"""Distance in tokens between the positions at which prompts are looked up. Prompts of fewer tokens are not
remembered."""
_WINDOW: Final = 64
_TRIES: Final = 32
"""Number of multiples of STEP at which an earlier prompt is looked up. A turn usually adds fewer than _TRIES * STEP
tokens."""

_Ids = npt.NDArray[np.uint32]
_Key = tuple[int, int, int, bytes]
"""Seed, block size, position, and the tokens before the position."""


@dataclass(slots=True)
class _Prompt:
    ids: _Ids
    hashes: Hashes


class PromptHashes:
    """A gateway's memory of recent prompts and of their prefix hashes."""

    def __init__(self, max_tokens: int = MAX_TOKENS) -> None:
        self._max_tokens = max_tokens
        self._prompts: OrderedDict[_Key, _Prompt] = OrderedDict()
        self.tokens = 0
        """Number of tokens of the remembered prompts."""
        self.hashed_blocks = 0
        """Number of blocks that were hashed, without those whose hashes were remembered."""

    def hashes(self, token_ids: Sequence[int] | _Ids, block_size: int, seed: int) -> Hashes:
        """Return the prefix hashes of the whole blocks of `token_ids`, as the function `prefix_hashes` does with
        `block_size` and `seed`. The caller must not change the ids later."""
        ids = np.asarray(token_ids, np.uint32)
        ids = ids[: len(ids) // block_size * block_size]
        known = self._known(ids, block_size, seed)
        blocks = len(known)
        self.hashed_blocks += len(ids) // block_size - blocks
        after = Prefix(int(known[-1]), blocks) if blocks else Prefix()
        hashes = prefix_hashes(ids[blocks * block_size :], block_size, seed, after)
        if blocks:
            hashes = np.concatenate((known, hashes))
        if len(ids) >= STEP:
            self._remember(_key(ids, len(ids) // STEP * STEP, block_size, seed), _Prompt(ids, hashes))
        return hashes

    def _known(self, ids: _Ids, block_size: int, seed: int) -> Hashes:
        """Return the hashes of the leading blocks that the prompt shares with a remembered prompt."""
        last = len(ids) // STEP
        for number in range(last, max(last - _TRIES, 0), -1):
            key = _key(ids, number * STEP, block_size, seed)
            prompt = self._prompts.get(key)
            if prompt is not None:
                count = min(len(prompt.ids), len(ids))
                same = prompt.ids[:count] == ids[:count]
                shared = count if same.all() else int(same.argmin())
                if shared == len(prompt.ids):
                    self._forget(key)  # the new prompt is remembered in its place
                return prompt.hashes[: shared // block_size]
        return np.empty(0, np.uint64)

    def _remember(self, key: _Key, prompt: _Prompt) -> None:
        self._forget(key)
        self._prompts[key] = prompt
        self.tokens += len(prompt.ids)
        while self.tokens > self._max_tokens:
            self._forget(next(iter(self._prompts)))

    def _forget(self, key: _Key) -> None:
        prompt = self._prompts.pop(key, None)
        if prompt is not None:
            self.tokens -= len(prompt.ids)


def _key(ids: _Ids, position: int, block_size: int, seed: int) -> _Key:
    return seed, block_size, position, ids[position - _WINDOW : position].tobytes()
