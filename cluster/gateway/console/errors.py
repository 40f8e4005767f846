"""The form of the console's errors: JSON with the code, the message and the field."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import orjson

from cluster.api.outcomes import OUTCOME_STATUS, CallError
from cluster.gateway.apis.http.body import Refused
from cluster.gateway.apis.http.exchange import ErrorAnswer, retry_headers

NO_STORE: Final = (b"cache-control", b"no-store")
JSON_HEADERS: Final = [NO_STORE, (b"x-content-type-options", b"nosniff")]


class ConsoleForm:
    """The form of the console's error responses: JSON. Implements ApiForm."""

    request_id_headers: Sequence[bytes] = (b"x-request-id",)
    key_header = b""

    def refused(self, refused: Refused, request_id: str) -> ErrorAnswer:
        """Return the response to a request that was refused before it became a call. Implements ApiForm."""
        content = error_body(refused.code.upper(), str(refused))
        return ErrorAnswer(refused.status, content, [*JSON_HEADERS, *refused.headers])

    def failed(self, error: CallError, request_id: str) -> ErrorAnswer:
        """Return the response to a request that failed. Implements ApiForm."""
        status = OUTCOME_STATUS[error.outcome]
        return ErrorAnswer(status.http, call_error_body(error), [*JSON_HEADERS, *retry_headers(error)])

    def event(self, error: CallError, request_id: str) -> bytes:
        """Return an error as the last line of a stream of JSON lines. Implements ApiForm."""
        return call_error_body(error) + b"\n"


FORM = ConsoleForm()


def error_body(code: str, message: str, field: str = "", **more: Any) -> bytes:
    """Return the JSON body of an error. `more`: further fields."""
    error: Mapping[str, Any] = {"code": code, "message": message, "field": field, **more}
    return orjson.dumps({"error": error})


def call_error_body(error: CallError) -> bytes:
    """Return the JSON body of a CallError. `code` in the body is the gRPC status, and `reason` is the reason of
    ErrorInfo."""
    field = error.violations[0].field if error.violations else ""
    code = OUTCOME_STATUS[error.outcome].grpc
    return error_body(code, error.message, field, reason=error.outcome.name, retry_after_s=error.retry_after_s)
