"""Metadata of a call, which is everything except the call's body."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from cluster.gateway.auth.authenticator import DEFAULT_PRINCIPAL
from cluster.observe.log import ids_of_call
from cluster.policy.tenants.identity import Principal


def do_nothing() -> None:
    """Do nothing. The release of a body that holds no bytes of the budget."""


@dataclass(slots=True)
class CallMeta:
    """Metadata of one call. `api` is the name of the API that received the call. `deadline` is a time of the
    CallService's clock, by default monotonic seconds; None: no deadline."""

    request_id: str
    api: str
    deadline: float | None = None
    traceparent: str = ""
    """The caller's W3C trace context, "" without one or with an invalid one."""
    trace_state: str = ""
    """The caller's tracestate, "" without one."""
    principal: Principal = DEFAULT_PRINCIPAL
    affinity_key: str = ""
    """Value of the header x-headrace-affinity, for APIs whose bodies have no such field."""
    counted: bool = False
    """Whether the call is already counted as a request of the call's tenant (`CallService.count`)."""
    release_body: Callable[[], None] = do_nothing
    """Returns the bytes of the call's body to the budget of request bytes. Called once the prompt is encoded, so that
    the budget also bounds the prompts that wait for the tokenizer; at the end of a call that keeps long texts of which
    few tokens are left. Idempotent."""

    @property
    def tenant(self) -> str:
        """Name of the call's tenant."""
        return self.principal.tenant.name

    @property
    def trace_id(self) -> str:
        """Id of the trace that the caller has named, 32 hex digits; "" without one."""
        return self.traceparent[3:35]

    @property
    def is_unsampled(self) -> bool:
        """Whether the caller has named a trace that is not sampled."""
        return self.traceparent != "" and not int(self.traceparent[-2:], 16) & 1

    @property
    def log_fields(self) -> Mapping[str, str]:
        """Fields of log lines about the call."""
        return ids_of_call(self.request_id, self.trace_id)
