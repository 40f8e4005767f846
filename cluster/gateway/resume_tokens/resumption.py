"""Resume of calls after the loss of their gateway. A gateway adds resume tokens to its streams, and opens calls from
the resume tokens that clients present.

token_chain.py defines the content of resume tokens. This module seals and opens the tokens, checks them against caller
and request, and claims them once. A resumed call is then like any other call that has lost its worker: the sequences
continue after the delivered tokens, on a compatible worker only.
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
from cluster.gateway.calls.call import Call, CallSequence
from cluster.gateway.calls.meta import CallMeta
from cluster.gateway.calls.request import GenerationRequest
from cluster.gateway.models.adapters import name_of
from cluster.gateway.resume_tokens.claim import TAKEN, ResumeClaims
from cluster.gateway.resume_tokens.first_claims import FirstClaims
from cluster.gateway.resume_tokens.token_chain import CallHead, InvalidToken, TokenChain
from cluster.gateway.resume_tokens.tokens import ResumeTokens
from cluster.policy.scheduling.worker_losses import CARRIED
from cluster.policy.tenants.identity import Principal

if TYPE_CHECKING:
    from cluster.ledger.usage.sealed_records import Envelopes

log = structlog.get_logger("resume")

PURPOSE = "resume-token"
MAX_TOKEN_BYTES = 4 << 20
AT_ONCE = 200
"""Number of resume tokens that are opened, in some milliseconds, before other callbacks of the event loop run."""
NOT_OF_CALL = (
    "is not a token of this call: send every token of one call, in order, as the same caller, with the same request"
)
TAKEN_OVER = "the call was resumed elsewhere: its stream continues there"
CLOCK_SKEW_S = 60.0
"""Largest assumed difference, in seconds, between the clocks of two gateways."""
STORE_TIMEOUT_S = 1.0
"""Longest time, in seconds, that the end of a call waits for the store of claims."""
GIVEN_UP = (
    Outcome.NO_WORKER,
    Outcome.WORKER_LOST,
    Outcome.MODEL_LOADING,
    Outcome.STORE_UNAVAILABLE,
    Outcome.SHED,
    Outcome.INTERNAL,
)
"""Outcomes that are not the fault of the client. After such an outcome, the cluster pays for the prompt of the next
resume."""


class ResumeService:
    """The resume service of one gateway. It reads the cluster's secrets when it first needs them."""

    def __init__(
        self,
        secrets: Callable[[], Sequence[bytes]],
        first_claims: FirstClaims,
        on_taken_over: Callable[[Call, int], None],
        expires_s: float,
        gateway: str = "",
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
    ) -> None:
        """`secrets`: returns the cluster's secrets and may raise ValueError. The first secret seals tokens; every
        secret opens tokens. `on_taken_over(call, generation)`: called after a resume at this gateway; it makes all
        workers end the sequences of earlier resumes of the call. `expires_s`: seconds after which tokens expire.
        `gateway`: incarnation of this gateway."""
        self._secrets = secrets
        self._gateway = gateway
        self._claims = ResumeClaims(first_claims, gateway)
        self._live: dict[str, Call] = {}
        self._on_taken_over = on_taken_over
        self._expires_s = expires_s
        self._clock = clock
        self._wall = wall
        self._envelopes: Envelopes | None = None
        self._cannot_seal = False

    def _sealer(self) -> Envelopes | None:
        """Return the object that seals and opens resume tokens. None if there is no secret and no secret can be made;
        then streams carry no resume tokens."""
        if self._envelopes is None and not self._cannot_seal:
            from cluster.ledger.usage.sealed_records import Envelopes  # imported only by gateways that seal

            try:
                self._envelopes = Envelopes(self._secrets(), PURPOSE, "resume token", MAX_TOKEN_BYTES)
            except (ValueError, OSError) as error:
                self._cannot_seal = True
                log.warning("resume.secret_not_read", error=str(error))
        return self._envelopes

    # ---- opening a call

    def begin(
        self, call: Call, request: GenerationRequest, meta: CallMeta, bundle_digest: str, chain: TokenChain | None
    ) -> None:
        """Make a call resumable. `chain`: the resume tokens after which a resumed call continues; None for a new call.
        `bundle_digest`: digest of the tokenizer bundle. Raises CallError."""
        envelopes = self._sealer()
        if envelopes is None:
            return
        first = call.sequences[0].request
        prompt = hashlib.sha256(array("I", first.prompt_token_ids).tobytes()).hexdigest()
        if chain is None:
            head = CallHead(
                call_id=call.id,
                request_id=meta.request_id,
                tenant=meta.tenant,
                subject=_subject(meta.principal),
                model=call.shown_model,
                adapter_digest="" if name_of(first.adapter) else first.adapter,
                request=request.resumable,
                prompt=prompt,
                seed=first.sampling.seed,
                deadline_s=0.0 if call.deadline is None else self._wall() + call.deadline - self._clock(),
                opened_s=self._wall(),
            )
        else:
            head = chain.call_head
            if (head.prompt, head.seed) != (prompt, first.sampling.seed):
                raise unsupported("its prompt has other tokens here (does its chat template contain the time?)")
        tokens = ResumeTokens(call.sequences, head, envelopes.seal, self._wall, self._expires_s, self._gateway)
        if call.trace is not None:
            tokens.traceparent = call.trace.context.traceparent
        call.make_resumable(tokens)
        if chain is None:
            self._live[call.id] = call
        else:
            _restore(call, tokens, chain, bundle_digest)
            if call.deadline is not None:
                late = CallError(Outcome.DEADLINE_EXCEEDED, "the deadline of the call's first request has passed")
                left_s = max(call.deadline - self._clock(), 0.0)
                tokens.timer = asyncio.get_running_loop().call_later(left_s, call.fail, late)

    # ---- a resumed call

    async def read(self, request: GenerationRequest, principal: Principal) -> TokenChain:
        """Open and check the tokens of a resume request, and return their chain. Raises CallError if a token belongs to
        another call, caller or request, or if the tokens have expired."""
        resume = request.resume
        assert resume is not None
        if not request.resumable:
            raise invalid("resumable", "must be true, as in the stream's first request")
        if not resume.tokens:
            raise invalid("resume_tokens", "must not be empty: without any, send a new call")
        from cluster.ledger.usage.sealed_records import SealError, UnknownSecret

        chain, now_s = TokenChain(), self._wall()
        envelopes = self._sealer()
        if envelopes is None:
            raise unsupported("this gateway has no secret")
        for number, token in enumerate(resume.tokens):
            try:
                chain.add(token, envelopes.open(token))
            except UnknownSecret:
                raise CallError(
                    Outcome.RESUME_EXPIRED, "the secret of the tokens has been replaced: send a new call"
                ) from None
            except (SealError, InvalidToken):
                raise invalid(f"resume_tokens[{number}]", NOT_OF_CALL) from None
            if number % AT_ONCE == AT_ONCE - 1:
                await asyncio.sleep(0)
        head = chain.call_head
        expected = (principal.tenant.name, _subject(principal), request.resumable)
        if (head.tenant, head.subject, head.request) != expected:
            raise invalid("resume_tokens[0]", NOT_OF_CALL)
        if resume.offset != chain.number:
            raise invalid(
                "offset", f"must be {chain.number}, the offset of the chunk with the last token; got {resume.offset}"
            )
        if now_s >= chain.expires_s:
            raise CallError(Outcome.RESUME_EXPIRED, f"the tokens expired after {self._expires_s:g} s: send a new call")
        return chain

    def deadline(self, chain: TokenChain, requested: float | None) -> float | None:
        """Return the deadline of a resumed call. It is the earlier of two: the deadline of the call's first request,
        and the deadline requested now. Deadlines are times of the service's clock."""
        until_s = chain.call_head.deadline_s
        if not until_s:
            return requested
        first = self._clock() + until_s - self._wall()
        return first if requested is None else min(first, requested)

    async def take_over(self, call: Call, chain: TokenChain) -> None:
        """Claim a resumed call for this gateway. If the call's earlier stream is at this gateway too, end it. Raises
        CallError."""
        lasts_s = max(chain.expires_s - self._wall(), 0) + CLOCK_SKEW_S
        claim = await self._claims.claim(chain, lasts_s)
        tokens = call.resume_tokens
        assert tokens is not None
        call_id = tokens.head.call_id
        earlier = self._live.get(call_id)
        if earlier is not None and earlier.resume_tokens is not None:
            if earlier.resume_tokens.generation > claim.generation:
                raise CallError(Outcome.RESUME_EXPIRED, f"the call {TAKEN}")
            for sequence, older in zip(call.sequences, earlier.sequences, strict=True):
                if more := _tokens_to_take_over(sequence, older):
                    sequence.take_over_tokens(more, older.life)
            earlier.fail(CallError(Outcome.CANCELLED, TAKEN_OVER))
        self._live[call_id] = call
        tokens.generation, tokens.silent, tokens.begun_at = claim.generation, claim.silent, claim.origin
        call.payment.resume(claim.terms)
        for sequence in call.sequences:
            sequence.restore_losses((CARRIED,) * claim.silent)
        self._on_taken_over(call, claim.generation)

    def taken_over(self, model: str) -> Sequence[tuple[str, int]]:
        """Return the open calls of a model that were resumed at this gateway: for each, the call id and the number of
        the resume (generation)."""
        return [
            (call_id, call.resume_tokens.generation)
            for call_id, call in self._live.items()
            if call.model == model and call.resume_tokens is not None and call.resume_tokens.generation
        ]

    def leave(self, call: Call) -> None:
        """Forget a call that has ended at this gateway."""
        if call.resume_tokens is not None and self._live.get(call.resume_tokens.head.call_id) is call:
            del self._live[call.resume_tokens.head.call_id]

    async def give_up(self, call: Call, outcome: Outcome) -> None:
        """If the outcome of an ended call is in GIVEN_UP, record that the cluster pays for the prompt of the next
        resume. If the call may have crashed workers, forbid further resumes instead. Does nothing if the store of
        claims does not answer in time."""
        tokens = call.resume_tokens
        if tokens is None or not tokens.number or not (call.blamed or outcome in GIVEN_UP):
            return
        record = self._claims.close if call.blamed else self._claims.give_up
        try:
            async with asyncio.timeout(STORE_TIMEOUT_S):
                await record(tokens.head.call_id, tokens.generation, self._expires_s + CLOCK_SKEW_S)
        except (CallError, TimeoutError) as error:
            log.warning("resume.end_not_recorded", **call.log_fields, error=str(error))


def _restore(call: Call, tokens: ResumeTokens, chain: TokenChain, bundle_digest: str) -> None:
    call.continue_from(chain.call_head.request_id)
    tokens.continue_after(chain)
    for index, choice in chain.choices.items():
        if choice.compatibility is not None and choice.compatibility.bundle_digest != bundle_digest:
            raise unsupported("its model has another tokenizer now")
        try:
            call.sequences[index].restore(choice)
        except (ValueError, IndexError):
            raise unsupported("its tokens have other text here than at its first gateway") from None


def _tokens_to_take_over(sequence: CallSequence, older: CallSequence) -> Sequence[int]:
    """Return the tokens of `older` that follow the restored tokens of `sequence`. `older`: the same sequence in the
    call's earlier stream at this gateway. Returns no tokens if the output has ended. Also returns no tokens if the
    output is parsed or has log probabilities, because parsed parts and log probabilities are not kept."""
    needs_more_than_ids = sequence.logprob_texts is not None or sequence.parsed_text is not None
    if sequence.finish_reason or older.finish_reason or needs_more_than_ids:
        return ()
    return older.emitted[len(sequence.emitted) :]


def unsupported(why: str) -> CallError:
    """Return the error for a call that cannot be continued exactly. `why`: the reason."""
    return CallError(Outcome.RESUME_UNSUPPORTED, f"the call cannot be resumed: {why}; send a new call")


def _subject(principal: Principal) -> str:
    return f"{principal.by}:{principal.subject}"
