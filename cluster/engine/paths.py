"""What the two ways to drive vLLM share: the records of live requests and the seam between them and the engine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from cluster.api.types import TokenOutput


@dataclass(slots=True)
class Live:
    """A request that vLLM holds."""

    prompt_tokens: int
    logprobs: int | None
    stop_token_ids: frozenset[int]
    grammar: bool
    first: bool = True


@dataclass(slots=True)
class StepStats:
    """The scheduler's statistics of the last step, and how many steps there were."""

    running: int = 0
    waiting: int = 0
    kv_usage: float = 0.0
    steps: int = 0


class EnginePath(Protocol):
    """One way to drive the engine core. Only `prepare` raises vLLM's own errors; a dead core is EngineDead."""

    stats: StepStats

    async def ready(self) -> None:
        """Finish what needs the event loop. Called once, before the first `prepare`."""

    def prepare(self, request_id: str, prompt: dict[str, Any], params: Any, priority: int) -> Any:
        """Validate, in any thread, and return what `add` takes. Raises vLLM's validation errors."""

    async def add(self, prepared: Any) -> None:
        """Hand a prepared request to the engine core."""

    async def abort(self, request_ids: Sequence[str]) -> None:
        """Drop requests that are live."""

    async def collect(self, live: Mapping[str, Live]) -> list[TokenOutput]:
        """Wait for one step and return its outputs for live requests; may be empty."""

    def dead(self) -> bool:
        """Whether the engine core is known to be dead."""

    def close(self) -> None:
        """End the engine core and its ranks; blocks until they are gone."""
