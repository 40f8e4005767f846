"""For each model, the number of replicas that it has and should have, and the reason for the controller's last
decision.

The numbers are in the catalog. The reasons are requested from the controller while a console is open, for a few models
at a time and at most once in REFRESH_S for each model. A reason is kept until the next answer arrives.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any, Final

from cluster.admin.v1 import scaling_pb2 as pb
from cluster.api.outcomes import CallError
from cluster.gateway.console.overview.rows import MAX_REASON_CHARS, Row
from cluster.gateway.models.known_model import KnownModel

REFRESH_S: Final = 5.0
MAX_ASKED: Final = 4
"""Maximum number of requests to the controller that are open at once."""
ANSWER_S: Final = 3.0
VERB: Final = "Fleet.ExplainScaling"
ACTOR: Final = "gateway:console"

Ask = Callable[[str, bytes, str, float], Coroutine[Any, Any, bytes]]


@dataclass(slots=True)
class _Known:
    asked_at: float
    reason: str | None = None
    is_frozen: bool | None = None


class ScalingReasons:
    """The controller's reasons for its newest scaling decisions, by model."""

    def __init__(self, ask: Ask) -> None:
        """`ask`: sends an admin request to the controller (CurrentController.ask)."""
        self._ask = ask
        self._known: dict[str, _Known] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    def refresh(self, models: Sequence[KnownModel], now: float) -> None:
        """Request the reason of the newest scaling decision from the controller, for each model whose known reason is
        older than REFRESH_S. The oldest reasons are requested first. Does not wait for the answers."""
        names = {model.name for model in models if model.in_catalog}
        for gone in self._known.keys() - names:
            del self._known[gone]
        due = [name for name in names if name not in self._known or now - self._known[name].asked_at >= REFRESH_S]
        due.sort(key=lambda name: self._known[name].asked_at if name in self._known else float("-inf"))
        for name in due[: MAX_ASKED - len(self._tasks)]:
            known = self._known.setdefault(name, _Known(now))
            known.asked_at = now
            task = asyncio.create_task(self._explain(name, known))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _explain(self, name: str, known: _Known) -> None:
        request = pb.ExplainScalingRequest(name=name, limit=1)
        try:
            answer = await self._ask(VERB, request.SerializeToString(), ACTOR, ANSWER_S)
        except CallError:  # there is no controller, or it does not know the model yet
            known.reason = known.is_frozen = None
            return
        scaling = pb.ExplainScalingResponse.FromString(answer)
        why = scaling.decisions[-1].why if scaling.decisions else scaling.model.why
        known.reason, known.is_frozen = why[:MAX_REASON_CHARS], scaling.model.by == "frozen"

    def is_frozen(self, model: str) -> bool | None:
        """Return whether a model's number of replicas is frozen; None if that is not known."""
        known = self._known.get(model)
        return None if known is None else known.is_frozen

    def rows(self, models: Sequence[Row]) -> list[Row]:
        """Return one row for each model of a document."""
        rows = []
        for model in models:
            known = self._known.get(model["id"])
            rows.append(
                {
                    "id": model["id"],
                    "wanted": model["replicas_desired"],
                    "had": model["replicas"],
                    "reason": None if known is None else known.reason,
                    "frozen": None if known is None else known.is_frozen,
                }
            )
        return rows

    async def close(self) -> None:
        """Stop requesting reasons."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
