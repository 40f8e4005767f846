"""Errors of calls that end while waiting for a worker. Each error has an outcome and a message that names the
remedy."""

from __future__ import annotations

from cluster.api.outcomes import CallError, Outcome
from cluster.api.types import ModelState
from cluster.gateway.models.known_model import KnownModel

_REFUSED = {
    Outcome.QUEUE_FULL: "the cluster's queue is full; retry after the given delay",
    Outcome.RATE_LIMITED: "too many of your own calls wait; wait until some have ended, or send fewer inputs in a call",
    Outcome.DEADLINE_UNREACHABLE: "the queue ahead is longer than the call's deadline; use a later one, or retry later",
}


def refused(outcome: Outcome) -> CallError:
    """Return the error for a call that the waiting room refused."""
    return CallError(outcome, _REFUSED[outcome])


def shed() -> CallError:
    """Return the error for a waiting call that was shed in favour of other calls."""
    return CallError(Outcome.SHED, "the cluster is short of room; retry after the given delay")


def not_servable(model: KnownModel, adapter: str = "") -> CallError | None:
    """Return the error for calls to a model or, if `adapter` is given, to this adapter of the model. None if such calls
    can be served now or later."""
    if model.state not in (ModelState.FAILED, ModelState.GONE):
        return model.adapters.refusal_of(model.name, adapter) if adapter else None
    reason = model.entry.state_reason or "no reason known"
    return CallError(Outcome.NO_WORKER, f"model {model.name} is {model.state.lower()}: {reason}")


def no_adapter(name: str) -> CallError:
    """Return the error for a call that may not wait for its adapter, because too many calls wait for adapters already.
    `name`: full name of the adapter."""
    message = f"too many calls wait until workers have loaded adapters such as {name}; retry after the given delay"
    return CallError(Outcome.MODEL_LOADING, message, retry_after_s=2.0)


def no_version(name: str) -> CallError:
    """Return the error for a call that may not wait for a worker of its version, because too many calls wait for such
    workers already. `name`: full name of the model."""
    message = f"too many calls wait for a version of {name} whose workers are full or gone; retry after the given delay"
    return CallError(Outcome.MODEL_LOADING, message, retry_after_s=2.0)


def too_late(name: str, model: KnownModel | None, deadline_passed: bool, adapter: str = "") -> CallError:
    """Return the error for a call that has waited the longest allowed time for a worker. `name`: name of the model.
    `adapter`: the model's adapter for which the call waited, "" for none. `deadline_passed`: whether the call's own
    deadline has passed."""
    if deadline_passed:
        return CallError(Outcome.DEADLINE_EXCEEDED, "the deadline passed while the call waited for a worker")
    if adapter and model is not None and model.links and not model.serves(adapter):
        reason = f" ({why})" if (why := model.adapters.shown_reason(adapter)) else ""
        return CallError(
            Outcome.MODEL_LOADING, f"adapter {name}:{adapter} is still loading{reason}; no worker had it in time"
        )
    if model is not None and model.links:
        return CallError(Outcome.SHED, "no worker had capacity in time; retry after the given delay")
    state = "gone" if model is None else model.state.lower()
    reason = f" ({model.entry.state_reason})" if model is not None and model.entry.state_reason else ""
    return CallError(Outcome.MODEL_LOADING, f"model {name} is still {state}{reason}; no worker came in time")


def replaced(tokens: int) -> CallError:
    """Return the error for a call that lost its worker and is incompatible with the replacement workers. `tokens`:
    number of tokens that the call has emitted."""
    why = "the replacement replicas have different weights, tokenizer or dtype, so the stream cannot continue"
    return CallError(Outcome.WORKER_LOST, f"{_lost(tokens)}, and {why}; retry the call")


def adapter_replaced(name: str) -> CallError:
    """Return the error for a call of which some outputs have begun with an adapter that was replaced, and others have
    not. `name`: full name of the adapter."""
    why = "its files were replaced while the call ran, and the outputs of one call must not come from different files"
    return CallError(
        Outcome.WORKER_LOST, f"no worker has the adapter {name} of this call any longer: {why}; retry the call"
    )


def blamed(tokens: int, workers: int) -> CallError:
    """Return the error for a call that lost several workers in a row and may have caused the losses."""
    why = f"the call lost {workers} workers in a row without a token between, so it is sent to no other worker"
    return CallError(Outcome.WORKER_LOST, f"{_lost(tokens)}; {why}; retry the call later, or change it")


def not_resumed(tokens: int, deadline_passed: bool) -> CallError:
    """Return the error for a call that lost its worker and found no other worker in time. `tokens`: number of tokens
    that were emitted. `deadline_passed`: whether the call's own deadline ended the wait, not the limit on the wait."""
    if deadline_passed:
        return CallError(Outcome.DEADLINE_EXCEEDED, "the deadline passed while the call waited for another worker")
    why = "no other worker with the same weights had capacity in time"
    return CallError(Outcome.WORKER_LOST, f"{_lost(tokens)}, and {why}; retry the call")


def _lost(tokens: int) -> str:
    return f"the worker was lost after {tokens} tokens"
