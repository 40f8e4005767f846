"""`HeadraceError`, the exception that every failed call raises. The exception is parsed from google.rpc.Status.

No other module of the SDK reads gRPC errors.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol, cast

import grpc
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2

from cluster.api.outcomes import Violation

DETAILS_KEY = "grpc-status-details-bin"
UNREACHABLE = "UNREACHABLE"


class HeadraceError(Exception):
    """A failed call.

    `reason` is the reason from ErrorInfo (MODEL_NOT_FOUND, INVALID_FIELD, QUEUE_FULL, ...). Without an ErrorInfo, the
    reason is UNREACHABLE if no gateway answered or the connection broke, and the name of the gRPC status otherwise.
    `code` is the name of the gRPC status. `retry_after_s` is None if a retry is pointless or the server sent no delay.
    """

    def __init__(
        self,
        reason: str,
        message: str,
        *,
        code: str = "UNKNOWN",
        violations: Sequence[Violation] = (),
        retry_after_s: float | None = None,
        request_id: str = "",
    ) -> None:
        super().__init__(message)
        self.reason = reason
        self.message = message
        self.code = code
        self.violations = tuple(violations)
        self.retry_after_s = retry_after_s
        self.request_id = request_id

    def __str__(self) -> str:
        return f"{self.reason}: {self.message}"

    def __repr__(self) -> str:
        return f"HeadraceError({self.reason!r}, {self.message!r}, request_id={self.request_id!r})"


def cancelled(message: str, request_id: str) -> HeadraceError:
    """Return the error of a call that the client itself has ended."""
    return HeadraceError("CANCELLED", message, code="CANCELLED", request_id=request_id)


class _RpcOutcome(Protocol):
    """The methods that the gRPC errors of blocking calls and of asyncio calls have in common."""

    def code(self) -> grpc.StatusCode: ...

    def details(self) -> str | None: ...

    def trailing_metadata(self) -> Iterable[tuple[str, str | bytes]] | None: ...


def from_rpc(error: grpc.RpcError, *, endpoint: str, request_id: str = "") -> HeadraceError:
    """Convert the gRPC error of a call to `endpoint` to a HeadraceError."""
    outcome = cast(_RpcOutcome, error)
    trailing = dict(outcome.trailing_metadata() or ())
    code, text = outcome.code(), outcome.details() or ""
    status = _status(trailing.get(DETAILS_KEY))
    failed = from_status(status, request_id=_text(trailing.get("x-request-id")) or request_id)
    if not status.details:
        failed.reason, failed.code, failed.message = code.name, code.name, text
    if not status.details and code is grpc.StatusCode.UNAVAILABLE:
        # gRPC's text lists every address with a prefix per address; the last part of the text names the failure
        failed.reason = UNREACHABLE
        failed.message = f"no gateway answers at {endpoint} ({text.rsplit(': ', 1)[-1].strip(') ')})"
    return failed


def from_status(status: status_pb2.Status, *, request_id: str = "") -> HeadraceError:
    """Convert a google.rpc.Status to a HeadraceError."""
    info = error_details_pb2.ErrorInfo()
    bad = error_details_pb2.BadRequest()
    retry = error_details_pb2.RetryInfo()
    for detail in status.details:
        for kind in (info, bad, retry):
            detail.Unpack(kind)
    code = _CODES.get(status.code, grpc.StatusCode.UNKNOWN).name
    return HeadraceError(
        info.reason or code,
        status.message,
        code=code,
        violations=[Violation(v.field, v.description) for v in bad.field_violations],
        retry_after_s=retry.retry_delay.ToNanoseconds() / 1e9 if retry.HasField("retry_delay") else None,
        request_id=request_id,
    )


_CODES: dict[int, grpc.StatusCode] = {code.value[0]: code for code in grpc.StatusCode}


def _status(packed: str | bytes | None) -> status_pb2.Status:
    """Unpack a google.rpc.Status. The result is empty if the server sent no status or a proxy damaged the status."""
    try:
        return status_pb2.Status.FromString(packed if isinstance(packed, bytes) else b"")
    except DecodeError:
        return status_pb2.Status()


def _text(value: str | bytes | None) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else value or ""
