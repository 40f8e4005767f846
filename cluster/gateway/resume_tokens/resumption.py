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
from typing import TYPE_CHECKING, Any

import structlog

from cluster.api.outcomes import CallError, Outcome, invalid
from cluster.gateway.calls.call import Call
from cluster.gateway.calls.request import GenerationRequest
from cluster.gateway.calls.sequence import Piece
from cluster.gateway.links.worker_link import LinkStream
from cluster.gateway.resume_tokens.claim import TAKEN, ResumeClaims
from cluster.gateway.resume_tokens.first_claims import FirstClaims
from cluster.gateway.resume_tokens.token_chain import (
    BadSegment,
    CallHead,
    Choice,
    Maker,
    TokenChain,
    digest_of,
    encode,
    encode_one,
    head_json,
    likeness_json,
)
from cluster.gateway.scheduling.worker_losses import CARRIED
from cluster.policy.tenants.identity import Principal

if TYPE_CHECKING:
    from cluster.gateway.service import CallMeta
    from cluster.ledger.usage.sealed_records import Envelopes

log = structlog.get_logger("resume")

PURPOSE = "resume-token"
MAX_TOKEN_BYTES = 4 << 20
WHOLE_TOKENS, WHOLE_SHARE = 64, 0.25
"""A token is whole when so many have come since the last whole one, and so many by what it would hold: what is sealed
again stays in proportion to what is sealed, and what has to be opened stays small."""
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


class ResumeTokens:
    """The tokens of one call: each chunk gets the next."""

    __slots__ = (
        "_before",
        "_chars",
        "_choices",
        "_due",
        "_expires_s",
        "_finishes",
        "_gateway",
        "_homes",
        "_seal",
        "_told",
        "_wall",
        "begun_at",
        "generation",
        "head",
        "number",
        "old",
        "silent",
        "timer",
        "whole",
    )

    def __init__(
        self,
        call: Call,
        head: CallHead,
        seal: Callable[[bytes], bytes],
        wall: Callable[[], float],
        expires_s: float,
        gateway: str = "",
    ) -> None:
        """`gateway`: this one's incarnation."""
        self.head = head
        self._gateway = gateway
        self.generation = 0
        """How often the call has been resumed."""
        self.silent = 0
        """How often in a row it had been, when it came here, without a new token."""
        self.begun_at = ""
        """The gateway that it was resumed from, where that decides who pays for its prompt."""
        self.number = 0
        self.old: set[int] = set()
        """Choices that have begun: their likeness is told."""
        self.whole = False
        """Whether the newest token says all that those before it do."""
        self.timer: asyncio.TimerHandle | None = None
        """Ends a call that goes on at its first deadline, which its new stream need not know."""
        self._seal = seal
        self._wall = wall
        self._expires_s = expires_s
        self._before = TokenChain().last
        self._choices = call.sequences
        self._told = [0] * len(call.sequences)
        self._chars = [0] * len(call.sequences)
        self._homes = [""] * len(call.sequences)
        self._finishes = [""] * len(call.sequences)
        self._due = WHOLE_TOKENS

    def go_on(self, chain: TokenChain) -> None:
        """Behind these."""
        self.number, self._before = chain.number, chain.last
        self._due = chain.number  # its reader need keep nothing of what it has shown
        for index, begun in chain.choices.items():
            self._told[index], self._chars[index] = len(begun.token_ids), begun.chars
            self._homes[index], self._finishes[index] = begun.home, begun.finish_reason
            self.old.add(index)

    def stream(self, index: int) -> LinkStream:
        """The choice's name at workers: the same at every gateway that goes on with it."""
        return LinkStream(f"{self.head.call_id}#{index}", self.generation, self.begun_at)

    def _maker(self) -> Maker:
        progressed = any(told > one.restored for told, one in zip(self._told, self._choices, strict=True))
        return Maker(self._gateway, self.generation, self.silent, progressed)

    def text(self, text: str) -> bytes:
        """For a chunk of choice 0 with this text and nothing else."""
        output = self._choices[0]
        ids, shown, told = output.emitted, output.shown, self._told[0]
        if shown - told != 1 or not self.old or output.home != self._homes[0] or self.number >= self._due:
            return self.chunk((Piece(0, text),))
        self.whole = False
        self._told[0] = shown
        self._chars[0] += len(text)
        expires_s = int(self._wall() + self._expires_s)
        self.number += 1
        return self._sealed(encode_one(self.number, expires_s, self._before, self._chars[0], ids[told]))

    def chunk(self, pieces: Sequence[Piece]) -> bytes:
        """For a chunk with these; without any it says that the call has got this far and no further."""
        more: dict[str, Any] = {} if self.number else {"call": head_json(self.head)}
        likeness, homes = {}, {}
        choices = []
        for piece in pieces:
            index = piece.index
            output = self._choices[index]
            shown = output.shown
            self._chars[index] += len(piece.text)
            self._finishes[index] = piece.finish_reason
            ids = output.emitted[self._told[index] : shown]
            choices.append(Choice(index, ids, self._chars[index], piece.finish_reason))
            self._told[index] = max(shown, self._told[index])
            if index not in self.old and output.likeness is not None:
                self.old.add(index)
                likeness[str(index)] = likeness_json(output.likeness)
            if output.home != self._homes[index]:
                homes[str(index)] = self._homes[index] = output.home
        if not self.number:
            more["maker"] = self._maker()
        self.whole = self.number >= self._due
        if self.whole:
            choices, likeness, homes = self._all()
            more = {"call": head_json(self.head), "whole": True, "maker": self._maker()}
            self._due = self.number + max(WHOLE_TOKENS, int(sum(self._told) * WHOLE_SHARE))
        if likeness:
            more["likeness"] = likeness
        if homes:
            more["homes"] = homes
        self.number += 1
        expires_s = int(self._wall() + self._expires_s)
        return self._sealed(encode(self.number, expires_s, self._before, choices, more))

    def _all(self) -> tuple[list[Choice], dict[str, list[str]], dict[str, str]]:
        """What has been delivered, and what is known of each choice's worker."""
        choices, likeness, homes = [], {}, {}
        for index, output in enumerate(self._choices):
            told = self._told[index]
            if told or index in self.old or self._finishes[index]:
                choices.append(Choice(index, output.emitted[:told], self._chars[index], self._finishes[index]))
                homes[str(index)] = self._homes[index]
            if index in self.old and output.likeness is not None:
                likeness[str(index)] = likeness_json(output.likeness)
        return choices, likeness, homes

    def _sealed(self, body: bytes) -> bytes:
        sealed = self._seal(body)
        self._before = digest_of(sealed)
        return sealed


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
        call.tickets = ResumeTokens(call, head, envelopes.seal, self._wall, self._expires_s, self._gateway)
        if chain is None:
            self._live[call.id] = call
        else:
            _restore(call, chain, bundle_digest)
            if call.deadline is not None:
                late = CallError(Outcome.DEADLINE_EXCEEDED, "the deadline that the call began with has passed")
                left_s = max(call.deadline - self._clock(), 0.0)
                call.tickets.timer = asyncio.get_running_loop().call_later(left_s, call.fail, late)

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
        tickets = call.tickets
        assert tickets is not None
        call_id = tickets.head.call_id
        before = self._live.get(call_id)
        if before is not None and before.tickets is not None:
            if before.tickets.generation > claim.generation:
                raise CallError(Outcome.RESUME_EXPIRED, f"the call {TAKEN}")
            for output, older in zip(call.sequences, before.sequences, strict=True):
                output.adopt(older)
            before.fail(CallError(Outcome.CANCELLED, TAKEN_OVER))
        self._live[call_id] = call
        tickets.generation, tickets.silent, tickets.begun_at = claim.generation, claim.silent, claim.origin
        call.terms = claim.terms
        for output in call.sequences:
            output.lost_links, output.lost_tokens = (CARRIED,) * claim.silent, len(output.emitted)
        self.on_taken_over(call, claim.generation)

    def taken_over(self, model: str) -> Sequence[tuple[str, int]]:
        """Calls of a model that were resumed and are served here, with their generations."""
        return [
            (call_id, call.tickets.generation)
            for call_id, call in self._live.items()
            if call.model == model and call.tickets is not None and call.tickets.generation
        ]

    def leave(self, call: Call) -> None:
        """A call is over here."""
        if call.tickets is not None and self._live.get(call.tickets.head.call_id) is call:
            del self._live[call.tickets.head.call_id]

    async def give_up(self, call: Call, outcome: Outcome) -> None:
        """A call has ended through no fault of its client, or may have ended workers: note what that means for its
        resumption, if the store answers in time."""
        tickets = call.tickets
        if tickets is None or not tickets.number or not (call.blamed or outcome in GIVEN_UP):
            return
        act = self._claims.close if call.blamed else self._claims.give_up
        try:
            async with asyncio.timeout(NOTE_S):
                await act(tickets.head.call_id, tickets.generation, self._expires_s + CLOCKS_S)
        except (CallError, TimeoutError) as error:
            log.warning("resumption_not_noted", request_id=call.request_id, error=str(error))


def _restore(call: Call, chain: TokenChain, bundle_digest: str) -> None:
    assert call.tickets is not None
    call.continues = True
    call.request_id = call.request_id and chain.whole.request_id
    call.tickets.go_on(chain)
    for index, begun in chain.choices.items():
        if begun.likeness is not None and begun.likeness.bundle_digest != bundle_digest:
            raise unsupported("its model has another tokenizer now")
        try:
            call.sequences[index].restore(begun)
        except (ValueError, IndexError):
            raise unsupported("its tokens read otherwise here than where it began") from None


def unsupported(why: str) -> CallError:
    """It cannot go on exactly, so it does not."""
    return CallError(Outcome.RESUME_UNSUPPORTED, f"the call cannot be resumed: {why}; begin anew")


def _subject(who: Principal) -> str:
    return f"{who.by}:{who.subject}"
