"""Choice of the simulated engine's next token: a hash of all tokens so far, the sampling parameters and the salt.

Problem: a fault test must not pass by luck. If a resumed request loses one token, one sampling parameter or its salt,
all later tokens must differ. Invariant: if the engine seed, the request's content and the tokens so far are equal, the
next tokens are equal on any engine, whatever the batch, the KV cache or preemptions. The salt counts only if `salted`
is set.

The tokens so far are read as the digits of one large number in base 2^32, which is taken modulo a prime P. C computes
this polynomial hash for a whole prompt at once (int.from_bytes). One multiplication extends the hash by one token. P is
not a Mersenne prime: modulo a Mersenne prime, the powers of 2^32 would repeat after a few positions. A splitmix64
finaliser (Steele, Lea, Flood 2014) then spreads the hash over all bits.
"""

from __future__ import annotations

import hashlib
import sys
from array import array
from collections.abc import Sequence

from cluster.api.types import EngineRequest, PositionLogprobs

P = 2**64 - 59
MASK = 2**64 - 1


def mix(x: int) -> int:
    """Return 64 well-mixed bits of a 64-bit number (the finaliser of splitmix64)."""
    x = (x + 0x9E3779B97F4A7C15) & MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
    return x ^ (x >> 31)


def digest64(*parts: object) -> int:
    """Return a 64-bit hash of the parts' repr. Unlike Python's string hash, this hash is the same in every process."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "big")


def fold(state: int, token_ids: Sequence[int]) -> int:
    """Return the hash state after `token_ids` are added to `state`. Each id is in [0, 2^32).

    fold(fold(s, a), b) == fold(s, a + b).
    """
    words = array("I", token_ids)
    if sys.byteorder == "little":
        words.byteswap()
    return int.from_bytes(state.to_bytes(8, "big") + words.tobytes(), "big") % P


def extend(state: int, token_id: int) -> int:
    """Return the hash state after one more token. The result is the same as that of `fold`, which adds several tokens
    at once."""
    return ((state << 32) | token_id) % P


def content_key(seed: int, request: EngineRequest, salted: bool = True) -> int:
    """Return a hash of everything that determines the next token, except the tokens so far.

    Limits (max_tokens, stops, ...) are not hashed. `salted`: whether the request's cache salt is hashed.

    The position at which the output begins is hashed only if the request has a frequency or presence penalty, a seed,
    or a grammar, since their effect depends on that position. When any other request is resumed, the emitted ids count
    as part of the prompt, as in a real engine.
    """
    s = request.sampling
    bias = tuple(sorted(s.logit_bias.items()))
    grammar = (s.grammar.kind, s.grammar.value) if s.grammar else None
    stateful = s.frequency_penalty or s.presence_penalty or s.seed is not None or grammar
    shaping = (s.temperature, s.top_p, s.top_k, s.min_p, s.seed, s.frequency_penalty, s.presence_penalty)
    boundary = len(request.prompt_token_ids) if stateful else -1
    salt = request.cache_salt if salted else ""
    return digest64(seed, salt, request.adapter, shaping, s.repetition_penalty, bias, grammar, boundary)


class TokenSource:
    """A source of token ids in [lo, hi). Each token is EOS with probability `eos_ratio`."""

    def __init__(self, lo: int, hi: int, eos_token_id: int | None, eos_ratio: float) -> None:
        self._lo = lo
        self._span = hi - lo
        self._eos = eos_token_id
        self._eos_below = int(eos_ratio * 2**64) if eos_token_id is not None else 0

    def draw(self, state: int, *, may_end: bool, ignore_eos: bool, forbidden: frozenset[int]) -> int:
        """Return the token that follows the hash state `state`.

        While `may_end` is false, no token in `forbidden` (EOS and stop ids) is drawn.
        """
        bits = mix(state)
        if self._eos is not None and may_end and not ignore_eos and mix(bits) < self._eos_below:
            return self._eos
        offset = bits % self._span
        if may_end or self._lo + offset not in forbidden:
            return self._lo + offset
        for step in range(1, self._span):
            token = self._lo + (offset + step) % self._span
            if token not in forbidden:
                return token
        return self._lo + offset

    def different(self, token_id: int) -> int:
        """Return a token other than `token_id`. If there is only one token, return that one."""
        return self._lo + (token_id - self._lo + 1) % self._span

    def logprobs(self, state: int, token_id: int, k: int, greedy: bool) -> PositionLogprobs:
        """Return invented log probabilities in vLLM's order: the sampled token, then the k most likely tokens.

        The sampled token may be one of the k most likely tokens.
        """
        bits = mix(state ^ MASK)
        rank = 0 if greedy else bits % 4
        k = min(k, self._span)
        values = [-((bits >> 8) % 1000) / 1000 - 0.75 * i for i in range(max(k, rank + 1))]
        base = token_id - self._lo
        top = [self._lo + (base + i - rank) % self._span for i in range(k)]
        if rank < k:
            top[rank] = token_id
        return PositionLogprobs([token_id, *top], [values[rank], *values[:k]])
