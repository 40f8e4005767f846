"""Errors in the form of Anthropic's API."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Final

from cluster.api.outcomes import OUTCOME_STATUS, CallError, Outcome, Violation
from cluster.gateway.apis.http.body import Refused
from cluster.gateway.apis.http.exchange import ErrorAnswer, retry_headers
from cluster.gateway.apis.openai.answers import body
from cluster.gateway.apis.openai.requests import with_caller_names

OVERLOADED: Final = 529
"""Anthropic's status for an overloaded service. Anthropic's clients retry it, as they retry 503."""
_OVERLOADS: Final = (Outcome.QUEUE_FULL, Outcome.SHED, Outcome.MODEL_LOADING, Outcome.NO_WORKER)
_TYPES: Final[Mapping[int, str]] = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    504: "timeout_error",
    OVERLOADED: "overloaded_error",
}
_TOOL: Final = re.compile(r"^(tools\[\d+\])(?:\.function)?(\.parameters\b)?")


def error_body(message: str, status: int, request_id: str) -> bytes:
    """Return an error as the JSON of Anthropic's error object. The type follows from the HTTP status."""
    kind = _TYPES.get(status, "invalid_request_error" if status < 500 else "api_error")
    return body({"type": "error", "error": {"type": kind, "message": message}, "request_id": request_id})


def status_of(error: CallError) -> int:
    """Return the HTTP status of a call's error."""
    return OVERLOADED if error.outcome in _OVERLOADS else OUTCOME_STATUS[error.outcome].http


def call_error_body(error: CallError, request_id: str) -> bytes:
    """Return the error of a call as the JSON of Anthropic's error object."""
    message = error.message
    if error.outcome is Outcome.CONTEXT_LENGTH_EXCEEDED:
        # Coding agents shorten their conversation when they read these words of Anthropic's own message.
        message = f"prompt is too long: {message}"
    return error_body(message, status_of(error), request_id)


class MessagesForm:
    """Implements ApiForm for Anthropic's API."""

    request_id_headers: Sequence[bytes] = (b"request-id", b"x-request-id")
    key_header = b"x-api-key"

    def refused(self, refused: Refused, request_id: str) -> ErrorAnswer:
        """Return the response to a request that did not become a call. Implements ApiForm."""
        status = OVERLOADED if refused.status == 503 else refused.status
        return ErrorAnswer(status, error_body(str(refused), status, request_id), refused.headers)

    def failed(self, error: CallError, request_id: str) -> ErrorAnswer:
        """Return the response to a call that failed. Implements ApiForm."""
        return ErrorAnswer(status_of(error), call_error_body(error, request_id), retry_headers(error))

    def event(self, error: CallError, request_id: str) -> bytes:
        """Return an error as the last event of a stream that has begun. Implements ApiForm."""
        return b"event: error\ndata: " + call_error_body(error, request_id) + b"\n\n"


FORM: Final = MessagesForm()


def with_messages_names(error: CallError, names: Mapping[str, str]) -> CallError:
    """Return the error with each field under the name that it has in the caller's body. `names`: maps field names of a
    generation request to names in the body. The schema of a tool, which is `function.parameters` in OpenAI's form, is
    named `input_schema`."""
    error = with_caller_names(error, names)
    renamed = [Violation(_tool_field(v.field), v.description) for v in error.violations]
    if renamed == list(error.violations):
        return error
    message = error.message
    for old, new in zip(error.violations, renamed, strict=True):
        message = message.replace(f"{old.field}:", f"{new.field}:", 1)
    return CallError(error.outcome, message, violations=renamed, retry_after_s=error.retry_after_s)


def _tool_field(field: str) -> str:
    return _TOOL.sub(lambda match: match[1] + (".input_schema" if match[2] else ""), field)
