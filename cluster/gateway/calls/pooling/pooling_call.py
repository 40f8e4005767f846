"""A pooling call: many inputs, one answer. The call has one sequence for each input, and generates no tokens."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, ClassVar

from cluster.api.pooling import PoolingTask
from cluster.api.types import TokenOutput
from cluster.gateway.calls.call import Call, CallSequence
from cluster.gateway.calls.pooling.pooled_sequence import PooledSequence
from cluster.gateway.calls.pooling.pooling_request import PoolingInputs


@dataclass(eq=False, slots=True)
class PoolingCall(Call):
    """A pooling call from arrival to end. `inputs`: the caller's inputs after the changes that guards have made."""

    is_pooling: ClassVar[bool] = True
    inputs: PoolingInputs = field(kw_only=True)
    task: PoolingTask = field(kw_only=True)
    _answered: int = field(init=False, default=0)

    def path(self, index: int) -> str:
        """Return the path of an input in the caller's body."""
        return self.inputs.path(index)

    def add_inputs(self, sequences: Iterable[PooledSequence[PoolingCall]]) -> None:
        """Add the sequences of the next inputs."""
        for sequence in sequences:
            own: Any = sequence
            self.sequences.append(own)
            self.usage.prompt_tokens += len(sequence.request.prompt_token_ids)

    def began(self, sequence: CallSequence, output: TokenOutput) -> None:
        """Handle the first output that a worker sends for a sequence."""
        cached = sequence.cached_at_worker(output)
        if sequence.route is not None:
            sequence.route.begin(cached, self.clock())
        self.usage.cached_tokens += cached
        self.events.began(sequence, cached)
        if sequence.link is not None:
            self.events.answered(sequence, sequence.link)

    def pooled(self, sequence: PooledSequence[Any], now: float) -> None:
        """Handle the vector of a sequence. The time of the first vector is recorded as `first_token_at`."""
        if self.first_token_at is None:
            self.first_token_at = now
            self.usage.ttft_s = now - self.arrived
        self._answered += 1
        own: Any = sequence
        self.events.finished(own)
        if self._answered == len(self.sequences):
            self.output.wake()

    @property
    def charged_prompt_tokens(self) -> int:
        """Number of prompt tokens that are charged. An input is charged if an engine has computed it, or may have been
        computing it when the caller cancelled."""
        if self._answered == len(self.sequences):
            return self.usage.prompt_tokens
        return sum(
            len(sequence.request.prompt_token_ids)
            for sequence in self.sequences
            if sequence.finish_reason or (self.error is None and sequence.life.computed)
        )

    async def vectors(self) -> list[bytes]:
        """Wait for the end of the call and return the vectors in the order of the inputs, each as little-endian float32
        values. The call keeps none of them. Raises the call's error."""
        while self._answered < len(self.sequences) and self.error is None:
            await self.output.news()
        if self.error is not None:
            raise self.error
        sequences: list[Any] = self.sequences
        vectors = [sequence.vector for sequence in sequences]
        for sequence in sequences:
            sequence.vector = b""
        return vectors
