"""Admin verbs that only the controller can execute. A gateway forwards them over the controller's Control stream.

If a verb raises a CallError, the gateway raises the same error with all its fields. If the stream ends before the
reply, the controller may have executed the verb: the operator gets an error that says so, and the gateway does not send
the request again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from typing import TypeVar

import structlog
from google.protobuf.message import DecodeError, Message

from cluster.api.outcomes import CallError, Outcome, Violation, invalid
from cluster.link.v1 import link_pb2 as pb

log = structlog.get_logger("admin_relay")

ANSWER_S = 30.0
NO_CONTROLLER_LINK = (
    "the controller has no link to this gateway: models keep serving; repeat the command when the link is back"
)

M = TypeVar("M", bound=Message)
Verb = Callable[[bytes, str], Awaitable[bytes]]
"""`(serialized request, actor) -> serialized response`; `actor` is the operator's name in the audit log. Raises
CallError."""


def verb(kind: type[M], act: Callable[[M, str], Awaitable[Message]]) -> Verb:
    """Wrap `act`, which takes a protobuf message and returns one, as a Verb. `kind`: the type of the request
    message."""

    async def answer(body: bytes, actor: str) -> bytes:
        try:
            request = kind.FromString(body)
        except DecodeError as error:
            raise invalid("", f"is not a valid request message of this verb: {error}") from None
        return (await act(request, actor)).SerializeToString()

    return answer


class AdminRequests:
    """The gateway's side of one Control stream: the admin requests that wait for the controller's reply."""

    def __init__(self, send: Callable[[pb.GatewayControlFrame], None], verbs: frozenset[str]) -> None:
        """`verbs`: the verbs that the controller supports."""
        self._send = send
        self._verbs = verbs
        self._next = 0
        self._waiting: dict[int, asyncio.Future[bytes]] = {}

    async def ask(self, name: str, body: bytes, actor: str, timeout_s: float = ANSWER_S) -> bytes:
        """Send the verb `name` with the serialized request `body`, and return the serialized response. Raises CallError
        if the controller returns an error, does not support the verb, or does not reply within `timeout_s` seconds."""
        if name not in self._verbs:
            raise CallError(Outcome.UNSUPPORTED_FEATURE, f"this cluster's controller does not know {name}: upgrade it")
        self._next += 1
        number, answer = self._next, asyncio.get_running_loop().create_future()
        self._waiting[number] = answer
        request = pb.AdminRequest(id=number, verb=name, body=body, actor=actor)
        self._send(pb.GatewayControlFrame(admin_request=request))
        try:
            async with asyncio.timeout(timeout_s):
                reply: bytes = await answer
            return reply
        except TimeoutError:
            message = (
                f"the controller has not answered within {timeout_s:g} s and may still do it: look before you repeat"
            )
            raise CallError(Outcome.NO_WORKER, message) from None
        finally:
            self._waiting.pop(number, None)

    def handle_reply(self, reply: pb.AdminReply) -> None:
        """Pass a reply to the request that has the same id. If no request with this id waits, the reply is ignored."""
        waiting = self._waiting.get(reply.id)
        if waiting is None or waiting.done():
            return
        if reply.outcome:
            waiting.set_exception(_error(reply))
        else:
            waiting.set_result(reply.body)

    def fail_all(self) -> None:
        """Make all waiting requests raise a CallError. Call this after the stream has ended."""
        message = "the controller was lost before it answered and may have done it: look before you repeat"
        for waiting in self._waiting.values():
            if not waiting.done():
                waiting.set_exception(CallError(Outcome.NO_WORKER, message))


async def answer(verbs: Mapping[str, Verb], request: pb.AdminRequest) -> pb.AdminReply:
    """Run the requested verb and return the controller's reply. Errors are returned in the reply, never raised."""
    try:
        act = verbs.get(request.verb)
        if act is None:
            raise CallError(Outcome.UNSUPPORTED_FEATURE, f"this controller does not know {request.verb}")
        return pb.AdminReply(id=request.id, body=await act(request.body, request.actor))
    except CallError as error:
        return _refusal(request.id, error)
    except Exception:  # the traceback goes to this process's log, not to the operator
        log.exception("admin.request_failed", verb=request.verb)
        message = f"unexpected failure of {request.verb} in the controller; see its log"
        return _refusal(request.id, CallError(Outcome.INTERNAL, message))


def _refusal(number: int, error: CallError) -> pb.AdminReply:
    reply = pb.AdminReply(id=number, outcome=error.outcome.value, message=error.message)
    reply.violations.extend(pb.WrongField(field=v.field, description=v.description) for v in error.violations)
    if error.retry_after_s is not None:
        reply.retry_after_s = error.retry_after_s
    return reply


def _error(reply: pb.AdminReply) -> CallError:
    try:
        outcome = Outcome(reply.outcome)
    except ValueError:  # the controller is of a later release
        outcome = Outcome.INTERNAL
    return CallError(
        outcome,
        reply.message,
        violations=[Violation(v.field, v.description) for v in reply.violations],
        retry_after_s=reply.retry_after_s if reply.HasField("retry_after_s") else None,
    )
