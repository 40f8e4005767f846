"""Outcomes of a call: one enum, and for each outcome the error reason, metric label, gRPC status and HTTP code."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass


class Outcome(enum.StrEnum):
    """Outcome of a call. The upper-case name is the `reason` of ErrorInfo; the value is the metric label."""

    OK = "ok"
    """The call was answered."""
    CANCELLED = "cancelled"
    """The client, an operator, or a resume of the call elsewhere ended it. Call again if the answer is still
    needed."""
    DEADLINE_EXCEEDED = "deadline_exceeded"
    """The deadline passed. Set a longer deadline."""
    MODEL_NOT_FOUND = "model_not_found"
    """The caller may use no model of this name, or the model is being removed. Use a name from `ListModels` or `GET
    /v1/models`."""
    INVALID_FIELD = "invalid_field"
    """A field of the request is invalid. Correct the fields that the error names."""
    CONTEXT_LENGTH_EXCEEDED = "context_length_exceeded"
    """The prompt does not fit into the model's context. Shorten the prompt."""
    UNAUTHENTICATED_KEY = "unauthenticated_key"
    """The request has no valid credentials. Send a valid API key, JWT or client certificate."""
    TENANT_SUSPENDED = "tenant_suspended"
    """The caller's tenant is suspended. An operator resumes it with `headrace tenants resume`."""
    STORE_UNAVAILABLE = "store_unavailable"
    """The database, the limits store or the token issuer does not answer. Retry after the delay; an operator checks
    that service."""
    RATE_LIMITED = "rate_limited"
    """A limit of the tenant is reached: per minute, concurrent calls, or waiting calls. Retry after the delay;
    without a delay the call alone exceeds the limit."""
    BUDGET_EXHAUSTED = "budget_exhausted"
    """The tenant's tokens of the day or month are used up. Retry after the delay, or an operator raises the budget;
    without a delay the call alone exceeds it."""
    QUEUE_FULL = "queue_full"
    """The waiting room is full, or the session holds too many calls. Retry after the delay, or open another
    session."""
    SHED = "shed"
    """The call waited, and no worker had capacity in time or other calls displaced it. Retry after the delay."""
    DEADLINE_UNREACHABLE = "deadline_unreachable"
    """The queue ahead is longer than the call's deadline. Set a longer deadline, or call later."""
    MODEL_LOADING = "model_loading"
    """No worker serves the model yet. Retry after the delay."""
    NO_WORKER = "no_worker"
    """The model has failed, or this gateway is stopping or overloaded. Retry after the delay, at another gateway if
    there is one; `headrace models` shows the model's state."""
    WORKER_LOST = "worker_lost"
    """The call's worker was lost and no other worker could continue the call. Retry the call; if the error names
    several lost workers, change the call."""
    RESUME_UNSUPPORTED = "resume_unsupported"
    """No worker can continue the call exactly. Begin the call anew."""
    RESUME_EXPIRED = "resume_expired"
    """The resume tokens have expired, were used before, or were sealed under a secret that is gone. Begin the call
    anew."""
    GUARD_REFUSED = "guard_refused"
    """A guard of the tenant refused the text. Change the text; the error names the guard."""
    ADAPTER_INVALID = "adapter_invalid"
    """No worker of the model could load the adapter. Leave the adapter out, or follow the error message, which has the
    reasons."""
    UNSUPPORTED_FEATURE = "unsupported_feature"
    """The model or the gateway does not support a part of the request. Follow the error message, which names the
    part."""
    MANAGED_BY_FILE = "managed_by_file"
    """The object is declared in a configuration file and read-only for the API. Change the file."""
    NOT_FOUND = "not_found"
    """The object does not exist. Check the name that the error shows."""
    ALREADY_EXISTS = "already_exists"
    """An object of that name exists. Choose another name."""
    PERMISSION_DENIED = "permission_denied"
    """The caller's role does not permit the operation. Use credentials of a role that does."""
    INTERNAL = "internal"
    """An unexpected error in the gateway or a worker. Report it with the request id, which the gateway's log has
    too."""


SHORT_OF_CAPACITY = (
    Outcome.QUEUE_FULL,
    Outcome.SHED,
    Outcome.DEADLINE_EXCEEDED,
    Outcome.DEADLINE_UNREACHABLE,
    Outcome.MODEL_LOADING,
    Outcome.NO_WORKER,
    Outcome.WORKER_LOST,
)
"""Outcomes that might have been prevented by more replicas."""


@dataclass(frozen=True, slots=True)
class OutcomeStatus:
    """Status codes with which the APIs report an outcome. `retry_after_s`: default delay before a retry, in seconds;
    None to suggest no delay."""

    grpc: str
    http: int
    retry_after_s: float | None = None


OUTCOME_STATUS: dict[Outcome, OutcomeStatus] = {
    Outcome.OK: OutcomeStatus("OK", 200),
    Outcome.CANCELLED: OutcomeStatus("CANCELLED", 499),
    Outcome.DEADLINE_EXCEEDED: OutcomeStatus("DEADLINE_EXCEEDED", 504),
    Outcome.MODEL_NOT_FOUND: OutcomeStatus("NOT_FOUND", 404),
    Outcome.INVALID_FIELD: OutcomeStatus("INVALID_ARGUMENT", 400),
    Outcome.CONTEXT_LENGTH_EXCEEDED: OutcomeStatus("INVALID_ARGUMENT", 400),
    Outcome.UNAUTHENTICATED_KEY: OutcomeStatus("UNAUTHENTICATED", 401),
    Outcome.TENANT_SUSPENDED: OutcomeStatus("PERMISSION_DENIED", 403),
    Outcome.STORE_UNAVAILABLE: OutcomeStatus("UNAVAILABLE", 503, 5.0),
    Outcome.RATE_LIMITED: OutcomeStatus("RESOURCE_EXHAUSTED", 429, 1.0),
    Outcome.BUDGET_EXHAUSTED: OutcomeStatus("RESOURCE_EXHAUSTED", 429, 60.0),
    Outcome.QUEUE_FULL: OutcomeStatus("RESOURCE_EXHAUSTED", 503, 1.0),
    Outcome.SHED: OutcomeStatus("RESOURCE_EXHAUSTED", 503, 1.0),
    Outcome.DEADLINE_UNREACHABLE: OutcomeStatus("DEADLINE_EXCEEDED", 504),
    Outcome.MODEL_LOADING: OutcomeStatus("UNAVAILABLE", 503, 5.0),
    Outcome.NO_WORKER: OutcomeStatus("UNAVAILABLE", 503, 1.0),
    Outcome.WORKER_LOST: OutcomeStatus("UNAVAILABLE", 503, 0.5),
    Outcome.RESUME_UNSUPPORTED: OutcomeStatus("UNAVAILABLE", 503),
    Outcome.RESUME_EXPIRED: OutcomeStatus("FAILED_PRECONDITION", 400),
    Outcome.GUARD_REFUSED: OutcomeStatus("PERMISSION_DENIED", 403),
    Outcome.ADAPTER_INVALID: OutcomeStatus("INVALID_ARGUMENT", 400),
    Outcome.UNSUPPORTED_FEATURE: OutcomeStatus("UNIMPLEMENTED", 400),
    Outcome.MANAGED_BY_FILE: OutcomeStatus("FAILED_PRECONDITION", 409),
    Outcome.NOT_FOUND: OutcomeStatus("NOT_FOUND", 404),
    Outcome.ALREADY_EXISTS: OutcomeStatus("ALREADY_EXISTS", 409),
    Outcome.PERMISSION_DENIED: OutcomeStatus("PERMISSION_DENIED", 403),
    Outcome.INTERNAL: OutcomeStatus("INTERNAL", 500),
}


@dataclass(frozen=True, slots=True)
class Violation:
    """A wrong field of a request: the path of the field (such as `messages[2].role`) and a description of the
    remedy."""

    field: str
    description: str


MAX_VIOLATIONS = 10
"""Maximum number of wrong fields that one error answer names. Further wrong fields are reported once these are
corrected."""
MAX_FIELD_CHARS, MAX_DESCRIPTION_CHARS, MAX_MESSAGE_CHARS = 256, 1024, 2048
MAX_QUOTED_CHARS = 100
_CUT = "..."


def quoted(value: object, most: int = MAX_QUOTED_CHARS) -> str:
    """Return the `repr` of a caller's value for an error message, with texts cut to `most` characters."""
    if isinstance(value, str | bytes) and len(value) > most:
        return repr(value[:most]) + _CUT
    return repr(value)


def shortened(text: str, most: int) -> str:
    """Return a text cut to `most` characters, with "..." appended if the text was longer."""
    return text if len(text) <= most else text[:most] + _CUT


class CallError(Exception):
    """Error of a call whose outcome is not OK.

    `message` is shown to the caller: it names the field and the remedy, and nothing internal. The size of an error is
    bounded: the error names at most MAX_VIOLATIONS fields, and every text is cut to a maximum length.
    """

    def __init__(
        self,
        outcome: Outcome,
        message: str,
        *,
        violations: Sequence[Violation] = (),
        retry_after_s: float | None = None,
        quota: Sequence[Violation] = (),
        headers: Sequence[tuple[str, str]] = (),
    ) -> None:
        """Create an error. `retry_after_s`: None for the default delay of `outcome`. `quota`: the exhausted limits.
        `headers`: headers of the answer (in gRPC, metadata)."""
        message = shortened(message, MAX_MESSAGE_CHARS)
        super().__init__(message)
        self.outcome = outcome
        self.message = message
        self.violations = tuple(map(_bounded, violations[:MAX_VIOLATIONS]))
        self.quota = tuple(quota)
        self.headers = tuple(headers)
        self.retry_after_s = OUTCOME_STATUS[outcome].retry_after_s if retry_after_s is None else retry_after_s

    def __reduce__(self) -> tuple[object, ...]:
        return _restored, (self.outcome, self.message, self.violations, self.retry_after_s, self.quota, self.headers)

    def __repr__(self) -> str:
        return f"CallError({self.outcome.name}: {self.message})"


def _restored(
    outcome: Outcome,
    message: str,
    violations: Sequence[Violation],
    retry_after_s: float | None,
    quota: Sequence[Violation],
    headers: Sequence[tuple[str, str]],
) -> CallError:
    """Rebuild a pickled error that another process of this gateway has raised."""
    error = CallError(outcome, message, violations=violations, quota=quota, headers=headers)
    error.retry_after_s = retry_after_s
    return error


def _bounded(violation: Violation) -> Violation:
    if len(violation.field) <= MAX_FIELD_CHARS and len(violation.description) <= MAX_DESCRIPTION_CHARS:
        return violation
    return Violation(
        shortened(violation.field, MAX_FIELD_CHARS), shortened(violation.description, MAX_DESCRIPTION_CHARS)
    )


def invalid(field: str, description: str) -> CallError:
    """Return the INVALID_FIELD error for one field of a request."""
    field = shortened(field, MAX_FIELD_CHARS)
    return CallError(Outcome.INVALID_FIELD, f"{field}: {description}", violations=[Violation(field, description)])
