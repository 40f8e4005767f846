"""The resume tokens of one call: each chunk of its stream carries the next. token_chain.py has their content."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

from cluster.gateway.calls.sequence import OutputSequence, Piece
from cluster.gateway.links.worker_link import LinkStream
from cluster.gateway.resume_tokens.token_chain import (
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

WHOLE_TOKENS, WHOLE_SHARE = 64, 0.25
"""A token is whole when so many have come since the last whole one, and so many by what it would hold: what is sealed
again stays in proportion to what is sealed, and what has to be opened stays small."""


class ResumeTokens:
    """The tokens of one call: each chunk gets the next."""

    __slots__ = (
        "_before",
        "_chars",
        "_delivered",
        "_due",
        "_expires_s",
        "_finishes",
        "_gateway",
        "_homes",
        "_seal",
        "_sequences",
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
        sequences: Sequence[OutputSequence[Any]],
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
        """How often in a row it had been resumed without a new token when it came here."""
        self.begun_at = ""
        """The gateway that it was resumed from, if that decides who pays for its prompt."""
        self.number = 0
        self.old: set[int] = set()
        """Choices that have begun: their compatibility key has been sent."""
        self.whole = False
        """Whether the newest token repeats all that those before it say."""
        self.timer: asyncio.TimerHandle | None = None
        """Ends a resumed call at the deadline that it began with."""
        self._seal = seal
        self._wall = wall
        self._expires_s = expires_s
        self._before = TokenChain().last
        self._sequences = sequences
        self._delivered = [0] * len(sequences)
        self._chars = [0] * len(sequences)
        self._homes = [""] * len(sequences)
        self._finishes = [""] * len(sequences)
        self._due = WHOLE_TOKENS

    def continue_after(self, chain: TokenChain) -> None:
        """Continue after the tokens of this chain."""
        self.number, self._before = chain.number, chain.last
        self._due = chain.number  # its reader need keep nothing of what it has shown
        for index, begun in chain.choices.items():
            self._delivered[index], self._chars[index] = len(begun.token_ids), begun.chars
            self._homes[index], self._finishes[index] = begun.home, begun.finish_reason
            self.old.add(index)

    def stream(self, index: int) -> LinkStream:
        """The choice's name at workers: the same at every gateway that continues it."""
        return LinkStream(f"{self.head.call_id}#{index}", self.generation, self.begun_at)

    def _maker(self) -> Maker:
        progressed = any(
            count > sequence.restored for count, sequence in zip(self._delivered, self._sequences, strict=True)
        )
        return Maker(self._gateway, self.generation, self.silent, progressed)

    def text(self, text: str) -> bytes:
        """The token for a chunk that has this text of choice 0 and nothing else."""
        sequence = self._sequences[0]
        ids, shown, delivered = sequence.emitted, sequence.shown, self._delivered[0]
        if shown - delivered != 1 or not self.old or sequence.last_worker != self._homes[0] or self.number >= self._due:
            return self.chunk((Piece(0, text),))
        self.whole = False
        self._delivered[0] = shown
        self._chars[0] += len(text)
        expires_s = int(self._wall() + self._expires_s)
        self.number += 1
        return self._sealed(encode_one(self.number, expires_s, self._before, self._chars[0], ids[delivered]))

    def chunk(self, pieces: Sequence[Piece]) -> bytes:
        """The token for a chunk with these pieces; without any it says how far the call has got."""
        more: dict[str, Any] = {} if self.number else {"call": head_json(self.head)}
        likeness, homes = {}, {}
        choices = []
        for piece in pieces:
            index = piece.index
            sequence = self._sequences[index]
            shown = sequence.shown
            self._chars[index] += len(piece.text)
            self._finishes[index] = piece.finish_reason
            ids = sequence.emitted[self._delivered[index] : shown]
            choices.append(Choice(index, ids, self._chars[index], piece.finish_reason))
            self._delivered[index] = max(shown, self._delivered[index])
            if index not in self.old and sequence.compatibility is not None:
                self.old.add(index)
                likeness[str(index)] = likeness_json(sequence.compatibility)
            if sequence.last_worker != self._homes[index]:
                homes[str(index)] = self._homes[index] = sequence.last_worker
        if not self.number:
            more["maker"] = self._maker()
        self.whole = self.number >= self._due
        if self.whole:
            choices, likeness, homes = self._all()
            more = {"call": head_json(self.head), "whole": True, "maker": self._maker()}
            self._due = self.number + max(WHOLE_TOKENS, int(sum(self._delivered) * WHOLE_SHARE))
        if likeness:
            more["likeness"] = likeness
        if homes:
            more["homes"] = homes
        self.number += 1
        expires_s = int(self._wall() + self._expires_s)
        return self._sealed(encode(self.number, expires_s, self._before, choices, more))

    def _all(self) -> tuple[list[Choice], dict[str, list[str]], dict[str, str]]:
        """All that has been delivered, and the compatibility key and worker of each choice."""
        choices, likeness, homes = [], {}, {}
        for index, sequence in enumerate(self._sequences):
            delivered = self._delivered[index]
            if delivered or index in self.old or self._finishes[index]:
                choices.append(Choice(index, sequence.emitted[:delivered], self._chars[index], self._finishes[index]))
                homes[str(index)] = self._homes[index]
            if index in self.old and sequence.compatibility is not None:
                likeness[str(index)] = likeness_json(sequence.compatibility)
        return choices, likeness, homes

    def _sealed(self, body: bytes) -> bytes:
        sealed = self._seal(body)
        self._before = digest_of(sealed)
        return sealed
