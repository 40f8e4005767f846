"""Claims on resumes of a call. A claim decides, once for all gateways, the number of the resume (its generation) and
who pays for the prompt.

Problem: a client may present any prefix of a stream's resume tokens, at any gateway, while the stream still runs. If
every such resume were served, a client could get many streams for the price of one prompt.

Invariants: an atomic write gives each resume of a call a separate generation, which is higher than the generation of
the presented tokens. Only the highest generation is served. The prompt is computed again free of charge only once per
generation, and only if the gateway of that generation was lost or gave the call up. In all other cases the client pays
for the prompt.
"""

from __future__ import annotations

import asyncio
import enum
from dataclasses import dataclass

from cluster.api.outcomes import CallError, Outcome
from cluster.gateway.resume_tokens.first_claims import FirstClaims
from cluster.gateway.resume_tokens.token_chain import Maker, TokenChain

MOST_RESUMPTIONS = 32
"""Maximum number of resumes from the tokens of one generation. Each different prefix of these tokens that a client
presents counts as one resume."""
TAKEN = "has been resumed from here already: read that stream, or send a new call"
TOO_OFTEN = "has been resumed too often from tokens of this generation: send a new call"


class ResumeTerms(enum.Enum):
    """Terms of a resume, which decide who pays if an engine computes the prompt again."""

    FREE = "free"
    """The cluster pays, because the previous gateway gave the call up, or because the tokens come from an older release
    and do not name their gateway."""
    IF_ALIVE = "if alive"
    """The client pays if the previous gateway is alive, else the cluster pays. The worker reports which is the case."""
    PAID = "paid"
    """The client pays, because the client left a gateway that still serves, or presents tokens of a generation that was
    resumed before."""


@dataclass(frozen=True, slots=True)
class ResumeClaim:
    """A successful claim on a resume. `generation`: number of the resume. `terms`: decide who pays if an engine
    computes the prompt again."""

    generation: int
    terms: ResumeTerms
    silent: int
    """Number of resumes in a row, directly before this resume, that delivered no new model token."""
    origin: str
    """If `terms` is IF_ALIVE, the incarnation of the gateway that made the presented tokens, else ""."""


class ResumeClaims:
    """Claims resumes of calls for one gateway. A claim decides, once for all gateways, the number of a resume and who
    pays for the prompt. The claims are in the store that all gateways share."""

    def __init__(self, first_claims: FirstClaims, gateway: str) -> None:
        self._first_claims = first_claims
        self._gateway = gateway

    async def claim(self, chain: TokenChain, lasts_s: float) -> ResumeClaim:
        """Claim the right to continue a call after the tokens of `chain`. The claim lasts `lasts_s` seconds. Raises
        CallError if the call was already resumed after the same tokens, or was resumed too often."""
        call_id, maker = chain.call_head.call_id, chain.maker
        first_claims, after = self._first_claims, maker.generation
        # All three claims at once: each of them waits for the store, and all streams of a lost gateway resume at the
        # same moment. Tokens that were resumed before claim nothing new, because the generation was claimed with them.
        # If the same tokens are presented twice at the same moment, the resume that is refused may have taken the next
        # generation: the served one then gets the generation after it, and the client pays for the prompt.
        is_new, is_next, not_given_up = await asyncio.gather(
            first_claims.claim_first(f"{call_id}.{chain.last.hex()}", lasts_s),
            first_claims.claim_first(_generation_name(call_id, after + 1), lasts_s),
            first_claims.claim_first(_given_up_name(call_id, after), lasts_s),
        )
        if not is_new:
            raise CallError(Outcome.RESUME_EXPIRED, f"the call {TAKEN}")
        generation = after + 1 if is_next else await self._next_generation(call_id, after + 1, lasts_s)
        terms = self._terms(maker, is_next, not not_given_up)
        silent = maker.silent + 1 if maker.generation and not maker.progressed else 0
        return ResumeClaim(generation, terms, silent, maker.gateway if terms is ResumeTerms.IF_ALIVE else "")

    async def _next_generation(self, call_id: str, after: int, lasts_s: float) -> int:
        for generation in range(after + 1, after + MOST_RESUMPTIONS):
            if await self._first_claims.claim_first(_generation_name(call_id, generation), lasts_s):
                return generation
        raise CallError(Outcome.RESUME_EXPIRED, f"the call {TOO_OFTEN}")

    def _terms(self, maker: Maker, first: bool, given_up: bool) -> ResumeTerms:
        """Return the terms of a resume, which decide who pays for the prompt. `maker`: the gateway that made the resume
        tokens that the client presented, with its generation (number of resumes). `first`: whether this is the first
        resume from tokens of that generation. `given_up`: whether the gateway in `maker` has given the call up."""
        if not maker.gateway:
            return ResumeTerms.FREE
        if not first:
            return ResumeTerms.PAID
        if given_up:
            return ResumeTerms.FREE
        return ResumeTerms.PAID if maker.gateway == self._gateway else ResumeTerms.IF_ALIVE

    async def give_up(self, call_id: str, generation: int, lasts_s: float) -> None:
        """Record that this gateway ends a call through no fault of the client. If the call is resumed after that, the
        cluster pays for the prompt, not the client. `generation`: number of the call's last resume. `lasts_s`: how long
        the record lasts, in seconds. Raises CallError if the store cannot be used."""
        await self._first_claims.claim_first(_given_up_name(call_id, generation), lasts_s)

    async def close(self, call_id: str, generation: int, lasts_s: float) -> None:
        """Prevent all further resumes of a call on all gateways. `generation`: number of the call's last resume.
        `lasts_s`: how many seconds the store remembers that the call cannot be resumed. Raises CallError."""
        names = (_generation_name(call_id, generation + number) for number in range(1, MOST_RESUMPTIONS + 1))
        await asyncio.gather(*(self._first_claims.claim_first(name, lasts_s) for name in names))


def _generation_name(call_id: str, generation: int) -> str:
    return f"{call_id}/{generation}"


def _given_up_name(call_id: str, generation: int) -> str:
    return f"{call_id}/{generation}/given-up"
