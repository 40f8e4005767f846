"""Conversion of a CallError to a gRPC status with google.rpc details (AIP-193)."""

from __future__ import annotations

import grpc
from google.protobuf import any_pb2, duration_pb2
from google.rpc import error_details_pb2, status_pb2

from cluster.api.outcomes import OUTCOME_STATUS, CallError

DOMAIN = "headrace"


def grpc_code(error: CallError) -> grpc.StatusCode:
    """Return the gRPC status code of an error."""
    return grpc.StatusCode[OUTCOME_STATUS[error.outcome].grpc]


def details(error: CallError) -> status_pb2.Status:
    """Return the google.rpc.Status of an error. The status always holds ErrorInfo. It also holds BadRequest if fields
    are wrong, QuotaFailure if limits are exceeded, and RetryInfo if a retry makes sense."""
    parts = [error_details_pb2.ErrorInfo(reason=error.outcome.name, domain=DOMAIN)]
    packed = [_pack(part) for part in parts]
    if error.violations:
        bad = error_details_pb2.BadRequest(
            field_violations=[
                error_details_pb2.BadRequest.FieldViolation(field=v.field, description=v.description)
                for v in error.violations
            ]
        )
        packed.append(_pack(bad))
    if error.quota:
        failure = error_details_pb2.QuotaFailure(
            violations=[
                error_details_pb2.QuotaFailure.Violation(subject=v.field, description=v.description)
                for v in error.quota
            ]
        )
        packed.append(_pack(failure))
    if error.retry_after_s is not None:
        delay = duration_pb2.Duration()
        delay.FromNanoseconds(int(error.retry_after_s * 1e9))
        packed.append(_pack(error_details_pb2.RetryInfo(retry_delay=delay)))
    return status_pb2.Status(code=grpc_code(error).value[0], message=error.message, details=packed)


def trailers(error: CallError) -> tuple[tuple[str, str | bytes], ...]:
    """Return the trailing metadata of an error. Besides RetryInfo the metadata holds grpc-retry-pushback-ms, since the
    built-in retries of gRPC ignore RetryInfo."""
    out: list[tuple[str, str | bytes]] = [("grpc-status-details-bin", details(error).SerializeToString())]
    if error.retry_after_s is not None:
        out.append(("grpc-retry-pushback-ms", str(int(error.retry_after_s * 1000))))
    elif error.quota:
        out.append(("grpc-retry-pushback-ms", "-1"))  # do not retry: the call alone exceeds its limit
    out.extend(error.headers)
    return tuple(out)


def _pack(message: object) -> any_pb2.Any:
    out = any_pb2.Any()
    out.Pack(message)  # type: ignore[arg-type]
    return out
