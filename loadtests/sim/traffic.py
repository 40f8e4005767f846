"""Simulated callers: tenants with their own distributions of prompt and output lengths. Random numbers are seeded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

MAX_PROMPT_TOKENS = 4096
MAX_OUTPUT_TOKENS = 1024


@dataclass(frozen=True, slots=True)
class Lengths:
    """Prompt length and output length of one call, in tokens."""

    prompt: int
    output: int


@dataclass(frozen=True, slots=True)
class SimTenant:
    """Behaviour of one simulated tenant.

    The tenant keeps `backlog` calls waiting at each of its gateways, or sends `rate_s` calls a second.
    `lengths` are drawn at random. All prompts of the tenant share their first `prefix_tokens` tokens.
    `gateways`: the gateways that the tenant uses; None for all.
    """

    name: str
    lengths: Sequence[Lengths]
    backlog: int = 0
    rate_s: float = 0.0
    weight: float = 1.0
    rank: int = 0
    prefix_tokens: int = 256
    gateways: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if not self.lengths:
            raise ValueError(f"tenant {self.name}: lengths must not be empty")
        if (self.backlog > 0) == (self.rate_s > 0):
            raise ValueError(f"tenant {self.name}: exactly one of backlog and rate_s must be above 0")

    def at(self, gateways: int) -> tuple[int, ...]:
        """Numbers of the gateways that the tenant uses, out of `gateways` gateways in total."""
        if self.gateways is None:
            return tuple(range(gateways))
        return tuple(sorted({g % gateways for g in self.gateways}))


def clipped(pairs: Sequence[tuple[int, int]]) -> list[Lengths]:
    """Return the lengths of a trace, clipped to the lengths that the simulated engine supports."""
    return [
        Lengths(min(max(prompt, 1), MAX_PROMPT_TOKENS), min(max(output, 1), MAX_OUTPUT_TOKENS))
        for prompt, output in pairs
    ]


def made_up(rng: Random, prompt: float, output: float, count: int = 500) -> list[Lengths]:
    """Return `count` log-normal lengths around the medians `prompt` and `output`, for use without a trace."""
    return clipped(
        [(round(prompt * rng.lognormvariate(0, 0.7)), round(output * rng.lognormvariate(0, 0.5))) for _ in range(count)]
    )


class PromptMaker:
    """Generator of prompts. A prompt is the prefix of its tenant, then a random part of one long random text."""

    def __init__(self, rng: Random, vocab: int) -> None:
        self._rng = rng
        self._text = [rng.randrange(vocab) for _ in range(1 << 16)]
        self._prefixes: dict[str, int] = {}

    def make(self, tenant: SimTenant, tokens: int) -> list[int]:
        """Return the token ids of a prompt with this number of tokens."""
        start = self._prefixes.setdefault(tenant.name, self._rng.randrange(1 << 15))
        prefix = self._text[start : start + min(tenant.prefix_tokens, tokens - 1)]
        at = self._rng.randrange((1 << 16) - MAX_PROMPT_TOKENS)
        return prefix + self._text[at : at + tokens - len(prefix)]
