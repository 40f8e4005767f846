"""Forwarding of admin methods to the controller. The gateway authorizes and audits the forwarded methods."""

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
    """Builds methods that forward requests to the controller. Passed to admin_methods as `forwarded`."""

    def __init__(self, hub: Hub, authorizer: AdminAuthorizer) -> None:
        self._hub = hub
        self._authorizer = authorizer

    def __call__(self, method: MethodDescriptor, verb: Verb) -> Method:
        """Return a method that forwards requests to the controller. Every request for a change is audited, even if it
        is refused."""
        name = f"{method.containing_service.name}.{method.name}"
        action = f"{method.containing_service.name.lower()}.{_snake(method.name)}"
        kind = GetMessageClass(method.output_type)

        async def forward(request: Message, caller: AdminCaller) -> Message:
            outcome = "ok"
            try:
                return kind.FromString(await self._hub.controller.ask(name, request.SerializeToString(), caller.actor))
            except CallError as error:
                outcome = error.outcome.value
                raise
            finally:
                if verb.grant != "read":
                    self._audit(caller, action, request, verb, outcome)

        return forward

    def _audit(self, caller: AdminCaller, action: str, request: Message, verb: Verb, outcome: str) -> None:
        object_name = str(getattr(request, verb.object)) if verb.object else ""
        reason = str(getattr(request, "reason", ""))
        self._authorizer.audit(
            caller, "admin", action, object_name, outcome=outcome, reason=reason, details=details(request, verb.object)
        )


def details(request: Message, excluded: str = "") -> Mapping[str, Any]:
    """Return the scalar fields of a request for an audit event. Long texts are cut to MAX_DETAIL characters. The field
    `reason` is left out, because the event has its own reason. `excluded`: name of a further field to leave out."""
    kept = {}
    for field, value in request.ListFields():
        if field.message_type is not None or field.is_repeated or field.name in (excluded, "reason"):
            continue
        kept[field.name] = value[:MAX_DETAIL] if isinstance(value, str) else value
    return kept


def _snake(name: str) -> str:
    return re.sub(r"(?<!^)(?=[A-Z])", "_", name).lower()
