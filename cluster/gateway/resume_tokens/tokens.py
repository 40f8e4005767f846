"""Generator of the resume tokens of one call. Each chunk of the call's stream carries the next token. token_chain.py
defines the content of tokens."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

from cluster.gateway.calls.sequences.pieces import Piece
from cluster.gateway.calls.sequences.sequence import OutputSequence
from cluster.gateway.links.worker_link import LinkStream
from cluster.gateway.resume_tokens.token_chain import (
    CallHead,
    Choice,
    Maker,
    TokenChain,
    compatibility_json,
    digest_of,
    encode,
    encode_one,
    head_json,
)

WHOLE_TOKENS, WHOLE_SHARE = 64, 0.25
"""Number of resume tokens from one whole token to the next: WHOLE_SHARE times the number of delivered ids, but at least
WHOLE_TOKENS. So repeated ids stay a bounded share of all sealed ids, and a client needs few tokens to resume."""


class ResumeTokens:
    """Generator of the resume tokens of one call. Each chunk gets the next token."""

    __slots__ = (
        "_before",
        "_chars",
        "_delivered",
        "_due",
        "_expires_s",
        "_finishes",
        "_gateway",
        "_seal",
        "_sequences",
        "_wall",
        "_workers",
        "begun",
        "begun_at",
        "generation",
        "head",
        "number",
        "silent",
        "timer",
        "traceparent",
        "whole",
    )

    def __init__(
        self,
        sequences: Sequence[OutputSequence[Any]],
        head: CallHead,
        seal: Callable[[bytes], bytes],
        wall: Callable[[], float],
        expires_s: float,
        gateway: str = "",
    ) -> None:
        """`gateway`: incarnation of this gateway. `expires_s`: seconds after which a token expires."""
        self.head = head
        self._gateway = gateway
        self.generation = 0
        """Generation of the call's last resume, 0 if the call began at this gateway."""
        self.silent = 0
        """Number of resumes in a row, directly before the resume at this gateway, that delivered no new model token."""
        self.begun_at = ""
        """Incarnation of the gateway from which the call was resumed, if that gateway's state decides who pays for the
        prompt, else ""."""
        self.number = 0
        self.begun: set[int] = set()
        """Indexes of the choices whose compatibility key is in a resume token already."""
        self.whole = False
        """Whether the newest token is whole, which means that it repeats everything that was delivered before."""
        self.traceparent = ""
        """Context of the call's span at this or an earlier gateway; "" if the call is not sampled."""
        self.timer: asyncio.TimerHandle | None = None
        """Timer that ends a resumed call at the deadline of the call's first request."""
        self._seal = seal
        self._wall = wall
        self._expires_s = expires_s
        self._before = TokenChain().last
        self._sequences = sequences
        self._delivered = [0] * len(sequences)
        self._chars = [0] * len(sequences)
        self._workers = [""] * len(sequences)
        self._finishes = [""] * len(sequences)
        self._due = WHOLE_TOKENS

    def continue_after(self, chain: TokenChain) -> None:
        """Continue after the tokens of `chain`: the call's next resume token follows the last token of `chain`."""
        self.number, self._before = chain.number, chain.last
        self.traceparent = self.traceparent or chain.traceparent
        self._due = chain.number  # the next token is whole: the client need not keep the presented tokens
        for index, choice in chain.choices.items():
            self._delivered[index], self._chars[index] = len(choice.token_ids), choice.chars
            self._workers[index], self._finishes[index] = choice.worker, choice.finish_reason
            self.begun.add(index)

    def stream(self, index: int) -> LinkStream:
        """Return the name by which workers know a choice (one output of the call). Every gateway that continues the
        choice uses the same name."""
        return LinkStream(f"{self.head.call_id}#{index}", self.generation, self.begun_at)

    def _maker(self) -> Maker:
        progressed = any(
            count > sequence.restored for count, sequence in zip(self._delivered, self._sequences, strict=True)
        )
        return Maker(self._gateway, self.generation, self.silent, progressed)

    def text(self, text: str) -> bytes:
        """Return the resume token for a chunk that holds only `text`, which belongs to choice 0."""
        sequence = self._sequences[0]
        ids, shown, delivered = sequence.emitted, sequence.pieces.shown, self._delivered[0]
        if (
            shown - delivered != 1
            or not self.begun
            or sequence.life.last_worker != self._workers[0]
            or self.number >= self._due
        ):
            return self.chunk((Piece(0, text),))
        self.whole = False
        self._delivered[0] = shown
        self._chars[0] += len(text)
        expires_s = int(self._wall() + self._expires_s)
        self.number += 1
        return self._sealed(encode_one(self.number, expires_s, self._before, self._chars[0], ids[delivered]))

    def chunk(self, pieces: Sequence[Piece]) -> bytes:
        """Return the resume token for a chunk with these pieces of output. Without pieces, the resume token only
        records how far the call has got."""
        more: dict[str, Any] = {} if self.number else {"call": head_json(self.head)}
        keys, workers = {}, {}
        choices = []
        for piece in pieces:
            index = piece.index
            sequence = self._sequences[index]
            shown = sequence.pieces.shown
            if waiting := sequence.pieces.logprobs:
                shown -= len(waiting)  # the log probabilities of these tokens are in a later chunk (logprob_cuts.py)
            self._chars[index] += piece.chars
            self._finishes[index] = piece.finish_reason
            ids = sequence.emitted[self._delivered[index] : shown]
            choices.append(Choice(index, ids, self._chars[index], piece.finish_reason))
            self._delivered[index] = max(shown, self._delivered[index])
            if index not in self.begun and sequence.life.compatibility is not None:
                self.begun.add(index)
                keys[str(index)] = compatibility_json(sequence.life.compatibility)
            if sequence.life.last_worker != self._workers[index]:
                workers[str(index)] = self._workers[index] = sequence.life.last_worker
        if not self.number:
            more["maker"] = self._maker()
        self.whole = self.number >= self._due
        if self.whole:
            choices, keys, workers = self._all()
            more = {"call": head_json(self.head), "whole": True, "maker": self._maker()}
            self._due = self.number + max(WHOLE_TOKENS, int(sum(self._delivered) * WHOLE_SHARE))
        if self.traceparent and "call" in more:
            more["trace"] = self.traceparent
        if keys:
            more["likeness"] = keys
        if workers:
            more["homes"] = workers
        self.number += 1
        expires_s = int(self._wall() + self._expires_s)
        return self._sealed(encode(self.number, expires_s, self._before, choices, more))

    def _all(self) -> tuple[list[Choice], dict[str, list[str]], dict[str, str]]:
        """Return all choices as delivered so far, and the compatibility key and the worker of each choice."""
        choices, keys, workers = [], {}, {}
        for index, sequence in enumerate(self._sequences):
            delivered = self._delivered[index]
            if delivered or index in self.begun or self._finishes[index]:
                choices.append(Choice(index, sequence.emitted[:delivered], self._chars[index], self._finishes[index]))
                workers[str(index)] = self._workers[index]
            if index in self.begun and sequence.life.compatibility is not None:
                keys[str(index)] = compatibility_json(sequence.life.compatibility)
        return choices, keys, workers

    def _sealed(self, body: bytes) -> bytes:
        sealed = self._seal(body)
        self._before = digest_of(sealed)
        return sealed
