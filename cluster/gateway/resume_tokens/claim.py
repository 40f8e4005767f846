"""A resumption of a call, as decided once for all gateways: its generation, and who pays for the prompt.

Problem: a client may show any prefix of a stream's tokens, at any gateway, while the stream still runs elsewhere. If
each is served, one prompt buys many generations.
Invariants: each resumption of a call has a generation of its own, higher than that of the tokens that it showed, by one
atomic write; only the highest is served. The prompt is computed again at the cluster's expense only once for a
generation whose gateway was lost or gave it up; in all other cases the client pays for it.
"""

from __future__ import annotations

import asyncio
import enum
from dataclasses import dataclass

from cluster.api.outcomes import CallError, Outcome
from cluster.gateway.resume_tokens.first_claims import FirstClaims
from cluster.gateway.resume_tokens.token_chain import Maker, TokenChain

MOST_RESUMPTIONS = 32
"""Of one generation's tokens; each prefix that a client shows is one."""
TAKEN = "has been resumed from here already: go on reading there, or begin anew"
TOO_OFTEN = "has been resumed too often from tokens of this age: begin anew"


class ResumeTerms(enum.Enum):
    """Who pays for the prompt of a resumed call when an engine reads it again."""

    FREE = "free"
    """The cluster: the gateway before gave the call up, or is of a release that does not say."""
    IF_ALIVE = "if alive"
    """The client, unless the gateway before is lost; the worker knows."""
    PAID = "paid"
    """The client, who left a gateway that serves, or goes back to tokens that were resumed before."""


@dataclass(frozen=True, slots=True)
class ResumeClaim:
    """What a resumption has won."""

    generation: int
    terms: ResumeTerms
    silent: int
    """How often in a row the call was resumed without a new token between, this time included."""
    origin: str
    """The gateway whose tokens were shown, where `terms` depend on it."""


class ResumeClaims:
    """Of one gateway, over the store that all share."""

    def __init__(self, takers: FirstClaims, gateway: str) -> None:
        self._takers = takers
        self._gateway = gateway

    async def claim(self, chain: TokenChain, lasts_s: float) -> ResumeClaim:
        """Take the call over from here. Raises CallError when these tokens were shown before, or too many were."""
        call_id, maker = chain.whole.call_id, chain.maker
        if not await self._takers.take(f"{call_id}.{chain.last.hex()}", lasts_s):
            raise CallError(Outcome.RESUME_EXPIRED, f"the call {TAKEN}")
        given_up = self._takers.take(_given_up(call_id, maker.generation), lasts_s)
        generation, not_given_up = await asyncio.gather(self._next(call_id, maker.generation, lasts_s), given_up)
        terms = self._terms(maker, generation == maker.generation + 1, not not_given_up)
        silent = maker.silent + 1 if maker.generation and not maker.progressed else 0
        return ResumeClaim(generation, terms, silent, maker.gateway if terms is ResumeTerms.IF_ALIVE else "")

    async def _next(self, call_id: str, after: int, lasts_s: float) -> int:
        for generation in range(after + 1, after + 1 + MOST_RESUMPTIONS):
            if await self._takers.take(_name(call_id, generation), lasts_s):
                return generation
        raise CallError(Outcome.RESUME_EXPIRED, f"the call {TOO_OFTEN}")

    def _terms(self, maker: Maker, first: bool, given_up: bool) -> ResumeTerms:
        if not maker.gateway:
            return ResumeTerms.FREE
        if not first:
            return ResumeTerms.PAID
        if given_up:
            return ResumeTerms.FREE
        return ResumeTerms.PAID if maker.gateway == self._gateway else ResumeTerms.IF_ALIVE

    async def give_up(self, call_id: str, generation: int, lasts_s: float) -> None:
        """This gateway ends a call through no fault of its client: the next resumption is free. Raises CallError."""
        await self._takers.take(_given_up(call_id, generation), lasts_s)

    async def close(self, call_id: str, generation: int, lasts_s: float) -> None:
        """Let nobody resume a call again. Raises CallError."""
        names = (_name(call_id, generation + number) for number in range(1, MOST_RESUMPTIONS + 1))
        await asyncio.gather(*(self._takers.take(name, lasts_s) for name in names))


def _name(call_id: str, generation: int) -> str:
    return f"{call_id}/{generation}"


def _given_up(call_id: str, generation: int) -> str:
    return f"{call_id}/{generation}/given-up"
