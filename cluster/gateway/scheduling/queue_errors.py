"""Why a call that waits ends without an answer: the outcome, and words that name what its caller can do."""

from __future__ import annotations

from cluster.api.outcomes import CallError, Outcome
from cluster.api.types import ModelState
from cluster.gateway.models import KnownModel

_NOT_LET_IN = {
    Outcome.QUEUE_FULL: "the cluster's queue is full; retry after the given pause",
    Outcome.RATE_LIMITED: "too many of your own calls wait already; let some of them end first",
    Outcome.DEADLINE_UNREACHABLE: "what waits before this call takes longer than its deadline allows",
}


def not_let_in(outcome: Outcome) -> CallError:
    """The waiting room has not taken it."""
    return CallError(outcome, _NOT_LET_IN[outcome])


def shed() -> CallError:
    """It waited, and had to leave for others."""
    return CallError(Outcome.SHED, "the cluster is short of room; retry after the given pause")


def hopeless(model: KnownModel) -> CallError | None:
    """Its model will not be served; None where it may be."""
    if model.state not in (ModelState.FAILED, ModelState.GONE):
        return None
    reason = model.entry.state_reason or "no reason known"
    return CallError(Outcome.NO_WORKER, f"model {model.name} is {model.state.lower()}: {reason}")


def too_late(name: str, model: KnownModel | None, deadline_passed: bool) -> CallError:
    """It has waited for a worker of the model called `name` as long as calls may."""
    if deadline_passed:
        return CallError(Outcome.DEADLINE_EXCEEDED, "the deadline passed while the call waited for a worker")
    if model is not None and model.links:
        return CallError(Outcome.SHED, "no worker had room in time; retry after the given pause")
    state = "gone" if model is None else model.state.lower()
    reason = f" ({model.entry.state_reason})" if model is not None and model.entry.state_reason else ""
    return CallError(Outcome.MODEL_LOADING, f"model {name} is still {state}{reason}; no worker came in time")


def replaced(tokens: int) -> CallError:
    """It has lost its worker, and what serves now would go on differently."""
    why = "those that have taken its place are not like it"
    return CallError(Outcome.WORKER_LOST, f"{_lost(tokens)}, and {why}; retry the call")


def blamed(tokens: int, workers: int) -> CallError:
    """Its workers were lost one after the other, and it may be the reason."""
    why = f"{workers} workers were lost with it in a row and no token came between: it is sent to no other"
    return CallError(Outcome.WORKER_LOST, f"{_lost(tokens)}; {why}; retry the call later, or change it")


def not_resumed(tokens: int, deadline_passed: bool) -> CallError:
    """It has lost its worker, and has waited for one like it as long as calls may."""
    if deadline_passed:
        return CallError(Outcome.DEADLINE_EXCEEDED, "the deadline passed while the call waited for another worker")
    why = "no other with the same weights came in time"
    return CallError(Outcome.WORKER_LOST, f"{_lost(tokens)}, and {why}; retry the call")


def _lost(tokens: int) -> str:
    return f"the worker was lost after {tokens} tokens"
