"""A sequence of a pooling call: one input, which becomes one vector and no tokens.

Like a sequence that generates text, a pooled sequence passes through queues, routing, links and accounts. If its worker
is lost before the vector has arrived, there is nothing to resume. The sequence then starts over on another worker.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol, TypeVar

from cluster.api.outcomes import CallError, Outcome, Violation
from cluster.api.output_parts import OutputPart
from cluster.api.pooling import PoolingTask
from cluster.api.types import FinishReason, TokenOutput
from cluster.gateway.calls.sequences.engine_errors import FAILED, refusal_of
from cluster.gateway.calls.sequences.linked_sequence import LinkedSequence
from cluster.gateway.calls.sequences.owner import SequenceOwner

FLOAT_BYTES = 4


class PoolingOwner(SequenceOwner, Protocol):
    """The part of a pooling call's interface that its sequences use."""

    def path(self, index: int) -> str:
        """Return the path of an input in the caller's body."""

    def pooled(self, sequence: PooledSequence[Any], now: float) -> None:
        """Handle the arrival of a vector, which finishes the sequence."""


Owner = TypeVar("Owner", bound=PoolingOwner)


@dataclass(eq=False, repr=False, slots=True)
class PooledSequence(LinkedSequence[Owner]):
    """The sequence of one input of a pooling call. Receives the worker's messages for this input (implements
    slots.Sink)."""

    delivered: ClassVar[int] = 0
    """See OutputSequence. Records of ended calls read `delivered` and the next two fields. All three are constants,
    since a pooled sequence has no tokens and no tool calls."""
    reasoning_tokens: ClassVar[int] = 0
    tool_parser: ClassVar[str] = ""
    vector: bytes = field(init=False, default=b"")
    """Little-endian float32 values; b"" until the sequence has finished."""

    def output(self, output: TokenOutput) -> None:
        """Handle the vector, or an error of the engine."""
        call = self.call
        if self.hedge is not None and output.finish not in FAILED:
            self.hedge.leave()
        if output.token_ids or (output.finish not in (None, FinishReason.STOP, *FAILED)):
            self._generates()
            return
        if output.times is not None and self.traced is not None:
            self.traced.add_times(output.times)
        if output.prompt_tokens is not None and self.hedge is None:
            self._record_first_output(output)
        if output.finish is None:
            return
        link, self.link = self.link, None
        if output.finish in FAILED or not self._is_sound(output.vector):
            self._engine_ended(FinishReason.ABORT, link)
            return
        self.vector = output.vector or b""
        self.finish("stop")
        self.last_token_at = call.clock()
        call.pooled(self, self.last_token_at)

    def token(self, token_id: int, now: float) -> None:
        """End the call because the worker has sent a token. Only a worker of an older release does that, because it
        generates text instead of computing a vector."""
        self._generates()

    def parsed_token(self, token_id: int, parts: Sequence[OutputPart], now: float) -> None:
        """End the call because the worker has sent a token. Only a worker of an older release does that, because it
        generates text instead of computing a vector."""
        self._generates()

    def _reject(self, reason: str, message: str, field: str) -> None:
        """End the call, because the engine has refused the input as invalid. The error names the input."""
        error = refusal_of(reason, message, field)
        if field not in ("prompt_token_ids", "prompt"):
            self.call.fail(error)
            return
        path = self.call.path(self.index)
        why = error.violations[0].description
        self.call.fail(CallError(error.outcome, f"{path}: {why}", violations=[Violation(path, why)]))

    def _engine_error(self) -> CallError:
        """Return the error of the call if engines have failed the input in all attempts. The error names the input."""
        path = self.call.path(self.index)
        why = (
            f"the engine computed no finite numbers for this input in {self.life.max_attempts} attempts; a retry is "
            "safe, but if it fails too, change this input or leave it out"
        )
        return CallError(Outcome.INTERNAL, f"{path}: {why}", violations=[Violation(path, why)])

    def _is_sound(self, vector: bytes | None) -> bool:
        """Return whether a vector has the requested length and only finite values."""
        import numpy as np  # not at the start: deferred_imports.py

        pooling = self.request.pooling
        assert pooling is not None
        if not vector or len(vector) % FLOAT_BYTES:
            return False
        wanted = 1 if pooling.task is PoolingTask.SCORE else pooling.dimensions
        if wanted is not None and len(vector) != FLOAT_BYTES * wanted:
            return False
        return bool(np.isfinite(np.frombuffer(vector, "<f4")).all())

    def _generates(self) -> None:
        """End the call, because the worker generates tokens instead of a vector."""
        self.call.fail(
            CallError(
                Outcome.UNSUPPORTED_FEATURE,
                "a worker of this model generates text instead of vectors: choose a model with a pooling task",
            )
        )
