"""Streams that outlive their gateway: tokens for what was delivered, and calls that go on from such tokens.

The content of tokens is token_chain.py's; here they are sealed, opened, checked against who asks and with which
request, and taken, once. What then goes on is a call like any other that has lost its worker: its outputs stand where
they stood, and only a worker like the one that began them goes on with them.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from array import array
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import structlog

from cluster.api.outcomes import CallError, Outcome, invalid
from cluster.gateway.calls.call import Call
from cluster.gateway.calls.meta import CallMeta
from cluster.gateway.calls.request import GenerationRequest
from cluster.gateway.resume_tokens.claim import TAKEN, ResumeClaims
from cluster.gateway.resume_tokens.first_claims import FirstClaims
from cluster.gateway.resume_tokens.token_chain import BadSegment, CallHead, TokenChain
from cluster.gateway.resume_tokens.tokens import ResumeTokens
from cluster.gateway.scheduling.worker_losses import CARRIED
from cluster.policy.tenants.identity import Principal

if TYPE_CHECKING:
    from cluster.ledger.usage.sealed_records import Envelopes

log = structlog.get_logger("resume")

PURPOSE = "resume-token"
MAX_TOKEN_BYTES = 4 << 20
AT_ONCE = 200
"""Tokens that are opened (some milliseconds) before the event loop turns to others."""
OTHERS = "is no token of this call: send every token of one call, in order, as its own caller, with its own request"
TAKEN_OVER = "the call was resumed elsewhere: its stream goes on there"
CLOCKS_S = 60.0
"""By so much the clocks of gateways may differ."""
NOTE_S = 1.0
"""How long the end of a call waits for the store."""
GIVEN_UP = (
    Outcome.NO_WORKER,
    Outcome.WORKER_LOST,
    Outcome.MODEL_LOADING,
    Outcome.STORE_UNAVAILABLE,
    Outcome.SHED,
    Outcome.INTERNAL,
)
"""Ends of a call that its client has not brought about."""


class ResumeService:
    """Of one gateway. The secret is looked for when it is first needed."""

    def __init__(
        self,
        secrets: Callable[[], Sequence[bytes]],
        takers: FirstClaims,
        expires_s: float,
        gateway: str = "",
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
    ) -> None:
        """`secrets`: the cluster's, the first seals, all open; raises ValueError. A token opens for `expires_s`.
        `gateway`: this one's incarnation."""
        self._secrets = secrets
        self._gateway = gateway
        self._claims = ResumeClaims(takers, gateway)
        self._live: dict[str, Call] = {}
        self.on_taken_over: Callable[[Call, int], None] = lambda call, generation: None
        """Told when a call was resumed here, so that every worker ends what it runs for readers before."""
        self._expires_s = expires_s
        self._clock = clock
        self._wall = wall
        self._envelopes: Envelopes | None = None
        self._hopeless = False

    def _sealing(self) -> Envelopes | None:
        """None where there is no secret and none can be made: then streams are what they were without tokens."""
        if self._envelopes is None and not self._hopeless:
            from cluster.ledger.usage.sealed_records import Envelopes  # what seals is imported by whoever needs it

            try:
                self._envelopes = Envelopes(self._secrets(), PURPOSE, "resume token", MAX_TOKEN_BYTES)
            except (ValueError, OSError) as error:
                self._hopeless = True
                log.warning("streams_not_resumable", error=str(error))
        return self._envelopes

    # ---- a call that begins

    def begin(
        self, call: Call, wish: GenerationRequest, meta: CallMeta, bundle_digest: str, chain: TokenChain | None
    ) -> None:
        """Its chunks get tokens; where it was begun elsewhere, it stands from now on where it stood. `bundle_digest` is
        the tokenizer's. Raises CallError."""
        envelopes = self._sealing()
        if envelopes is None:
            return
        request = call.sequences[0].request
        prompt = hashlib.sha256(array("I", request.prompt_token_ids).tobytes()).hexdigest()
        if chain is None:
            head = CallHead(
                call_id=call.id,
                request_id=meta.request_id,
                tenant=meta.tenant,
                subject=_subject(meta.principal),
                model=call.model,
                request=wish.resumable,
                prompt=prompt,
                seed=request.sampling.seed,
                deadline_s=0.0 if call.deadline is None else self._wall() + call.deadline - self._clock(),
                opened_s=self._wall(),
            )
        else:
            head = chain.whole
            if (head.prompt, head.seed) != (prompt, request.sampling.seed):
                raise unsupported("its prompt reads otherwise here than where it began (does its template tell time?)")
        tokens = ResumeTokens(call.sequences, head, envelopes.seal, self._wall, self._expires_s, self._gateway)
        call.make_resumable(tokens)
        if chain is None:
            self._live[call.id] = call
        else:
            _restore(call, tokens, chain, bundle_digest)
            if call.deadline is not None:
                late = CallError(Outcome.DEADLINE_EXCEEDED, "the deadline that the call began with has passed")
                left_s = max(call.deadline - self._clock(), 0.0)
                tokens.timer = asyncio.get_running_loop().call_later(left_s, call.fail, late)

    # ---- a call that goes on

    async def read(self, wish: GenerationRequest, who: Principal) -> TokenChain:
        """What the tokens of a wish to resume say, if they are all of one call, of this caller and this request.

        Raises CallError."""
        asked = wish.resume
        assert asked is not None
        if not wish.resumable:
            raise invalid("resumable", "must be true, as in the request that began the stream")
        if not asked.tokens:
            raise invalid("resume_tokens", "must not be empty: without any, begin anew")
        from cluster.ledger.usage.sealed_records import SealError, UnknownSecret

        chain, now_s = TokenChain(), self._wall()
        envelopes = self._sealing()
        if envelopes is None:
            raise unsupported("this gateway has no secret")
        for number, token in enumerate(asked.tokens):
            try:
                chain.add(token, envelopes.open(token))
            except UnknownSecret:
                raise CallError(Outcome.RESUME_EXPIRED, "the tokens' secret has been replaced: begin anew") from None
            except (SealError, BadSegment):
                raise invalid(f"resume_tokens[{number}]", OTHERS) from None
            if number % AT_ONCE == AT_ONCE - 1:
                await asyncio.sleep(0)
        head = chain.whole
        ours = (who.tenant.name, _subject(who), wish.resumable)
        if (head.tenant, head.subject, head.request) != ours:
            raise invalid("resume_tokens[0]", OTHERS)
        if asked.offset != chain.number:
            raise invalid("offset", f"must be the newest chunk's, whose token comes last: {chain.number}")
        if now_s >= chain.expires_s:
            raise CallError(Outcome.RESUME_EXPIRED, f"the tokens opened for {self._expires_s:g} s: begin anew")
        return chain

    def deadline(self, chain: TokenChain, asked: float | None) -> float | None:
        """The call's own, or the one asked for now where that is earlier. Points of the service's clock."""
        until_s = chain.whole.deadline_s
        if not until_s:
            return asked
        own = self._clock() + until_s - self._wall()
        return own if asked is None else min(own, asked)

    async def take_over(self, call: Call, chain: TokenChain) -> None:
        """Let a resumed call be the one that is served: readers before it end. Raises CallError."""
        lasts_s = max(chain.expires_s - self._wall(), 0) + CLOCKS_S
        claim = await self._claims.claim(chain, lasts_s)
        tokens = call.resume_tokens
        assert tokens is not None
        call_id = tokens.head.call_id
        before = self._live.get(call_id)
        if before is not None and before.resume_tokens is not None:
            if before.resume_tokens.generation > claim.generation:
                raise CallError(Outcome.RESUME_EXPIRED, f"the call {TAKEN}")
            for sequence, older in zip(call.sequences, before.sequences, strict=True):
                sequence.adopt(older)
            before.fail(CallError(Outcome.CANCELLED, TAKEN_OVER))
        self._live[call_id] = call
        tokens.generation, tokens.silent, tokens.begun_at = claim.generation, claim.silent, claim.origin
        call.claim(claim.terms)
        for sequence in call.sequences:
            sequence.carry_losses((CARRIED,) * claim.silent)
        self.on_taken_over(call, claim.generation)

    def taken_over(self, model: str) -> Sequence[tuple[str, int]]:
        """Calls of a model that were resumed and are served here, with their generations."""
        return [
            (call_id, call.resume_tokens.generation)
            for call_id, call in self._live.items()
            if call.model == model and call.resume_tokens is not None and call.resume_tokens.generation
        ]

    def leave(self, call: Call) -> None:
        """A call is over here."""
        if call.resume_tokens is not None and self._live.get(call.resume_tokens.head.call_id) is call:
            del self._live[call.resume_tokens.head.call_id]

    async def give_up(self, call: Call, outcome: Outcome) -> None:
        """A call has ended through no fault of its client, or may have ended workers: note what that means for its
        resumption, if the store answers in time."""
        tokens = call.resume_tokens
        if tokens is None or not tokens.number or not (call.blamed or outcome in GIVEN_UP):
            return
        act = self._claims.close if call.blamed else self._claims.give_up
        try:
            async with asyncio.timeout(NOTE_S):
                await act(tokens.head.call_id, tokens.generation, self._expires_s + CLOCKS_S)
        except (CallError, TimeoutError) as error:
            log.warning("resumption_not_noted", request_id=call.request_id, error=str(error))


def _restore(call: Call, tokens: ResumeTokens, chain: TokenChain, bundle_digest: str) -> None:
    call.continue_from(chain.whole.request_id)
    tokens.continue_after(chain)
    for index, begun in chain.choices.items():
        if begun.likeness is not None and begun.likeness.bundle_digest != bundle_digest:
            raise unsupported("its model has another tokenizer now")
        try:
            sequence = call.sequences[index]
            sequence.restore(begun.token_ids, begun.chars, begun.finish_reason, begun.home, begun.likeness)
        except (ValueError, IndexError):
            raise unsupported("its tokens read otherwise here than where it began") from None


def unsupported(why: str) -> CallError:
    """It cannot go on exactly, so it does not."""
    return CallError(Outcome.RESUME_UNSUPPORTED, f"the call cannot be resumed: {why}; begin anew")


def _subject(who: Principal) -> str:
    return f"{who.by}:{who.subject}"
