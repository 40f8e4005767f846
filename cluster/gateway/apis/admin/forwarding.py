"""Admin verbs that the controller answers: the door here decides who may, the audit here keeps who did."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass

from cluster.api.outcomes import CallError
from cluster.gateway.apis.admin.authorization import AdminAuthorizer, AdminCaller, Method, Verb
from cluster.gateway.links.hub import Hub

MAX_DETAIL = 256


class ForwardedVerbs:
    """Makes methods of those verbs. Give it to AdminAuthorizer.handlers as `elsewhere`."""

    def __init__(self, hub: Hub, door: AdminAuthorizer) -> None:
        self._hub = hub
        self._door = door

    def __call__(self, method: MethodDescriptor, verb: Verb) -> Method:
        """The method that asks the controller; whatever it changes or is refused goes to the audit."""
        name = f"{method.containing_service.name}.{method.name}"
        action = f"{method.containing_service.name.lower()}.{_snake(method.name)}"
        kind = GetMessageClass(method.output_type)

        async def ask(request: Message, asker: AdminCaller) -> Message:
            outcome = "ok"
            try:
                return kind.FromString(await self._hub.ask_controller(name, request.SerializeToString(), asker.actor))
            except CallError as error:
                outcome = error.outcome.value
                raise
            finally:
                if verb.what != "read":
                    self._audit(asker, action, request, verb, outcome)

        return ask

    def _audit(self, asker: AdminCaller, action: str, request: Message, verb: Verb, outcome: str) -> None:
        about = str(getattr(request, verb.object)) if verb.object else ""
        reason = str(getattr(request, "reason", ""))
        self._door.audit(
            asker, "admin", action, about, outcome=outcome, reason=reason, details=details(request, verb.object)
        )


def details(request: Message, without: str = "") -> Mapping[str, Any]:
    """A request's plain fields, long texts cut: what the audit keeps of it."""
    plain = {}
    for field, value in request.ListFields():
        if field.message_type is not None or field.is_repeated or field.name in (without, "reason"):
            continue
        plain[field.name] = value[:MAX_DETAIL] if isinstance(value, str) else value
    return plain


def _snake(name: str) -> str:
    return re.sub(r"(?<!^)(?=[A-Z])", "_", name).lower()
