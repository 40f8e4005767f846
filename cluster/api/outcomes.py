"""Outcomes of a call: one enum with the error reason, metric label, gRPC status and HTTP code of each."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass


class Outcome(enum.StrEnum):
    """Outcome of a call. The upper-case name is the `reason` of ErrorInfo; the value is the metric label."""

    OK = "ok"
    CANCELLED = "cancelled"
    DEADLINE_EXCEEDED = "deadline_exceeded"
    MODEL_NOT_FOUND = "model_not_found"
    INVALID_FIELD = "invalid_field"
    CONTEXT_LENGTH_EXCEEDED = "context_length_exceeded"
    UNAUTHENTICATED_KEY = "unauthenticated_key"
    TENANT_SUSPENDED = "tenant_suspended"
    STORE_UNAVAILABLE = "store_unavailable"
    RATE_LIMITED = "rate_limited"
    BUDGET_EXHAUSTED = "budget_exhausted"
    QUEUE_FULL = "queue_full"
    SHED = "shed"
    DEADLINE_UNREACHABLE = "deadline_unreachable"
    MODEL_LOADING = "model_loading"
    NO_WORKER = "no_worker"
    WORKER_LOST = "worker_lost"
    RESUME_UNSUPPORTED = "resume_unsupported"
    RESUME_EXPIRED = "resume_expired"
    GUARD_REFUSED = "guard_refused"
    ADAPTER_INVALID = "adapter_invalid"
    UNSUPPORTED_FEATURE = "unsupported_feature"
    MANAGED_BY_FILE = "managed_by_file"
    NOT_FOUND = "not_found"
    ALREADY_EXISTS = "already_exists"
    PERMISSION_DENIED = "permission_denied"
    INTERNAL = "internal"


@dataclass(frozen=True, slots=True)
class OutcomeStatus:
    """Answer of the APIs to an outcome: gRPC status name, HTTP code and the default delay before a retry."""

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
    """One wrong field: its path in the request (`messages[2].role`) and what to do about it."""

    field: str
    description: str


MAX_VIOLATIONS = 10
"""Wrong fields that one answer names. Further ones are reported once these are corrected."""
MAX_FIELD_CHARS, MAX_DESCRIPTION_CHARS, MAX_MESSAGE_CHARS = 256, 1024, 2048
MAX_QUOTED_CHARS = 100
_CUT = "..."


def quoted(value: object, most: int = MAX_QUOTED_CHARS) -> str:
    """Return the `repr` of a caller's value for an error message, with texts cut to `most` characters."""
    if isinstance(value, str | bytes) and len(value) > most:
        return repr(value[:most]) + _CUT
    return repr(value)


def shortened(text: str, most: int) -> str:
    """Return a text cut to `most` characters, with "..." appended if it was longer."""
    return text if len(text) <= most else text[:most] + _CUT


class CallError(Exception):
    """Error of a call whose outcome is not OK.

    `message` is for the caller: it names the field and the remedy and nothing internal. Its size is bounded whatever
    the request held: at most MAX_VIOLATIONS fields, and every text is cut to its maximum length.
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
        """Create an error. `quota` names the exhausted limits; `headers` are sent with the answer (gRPC metadata)."""
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
