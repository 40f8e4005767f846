"""The steps of opening a call that all kinds of calls share: the choice of the model, and the fields of the call."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from cluster.api.outcomes import CallError, Outcome, invalid, quoted
from cluster.gateway.apis.request_ids import random_id
from cluster.gateway.calls import request as requests
from cluster.gateway.calls.call import Call
from cluster.gateway.calls.meta import CallMeta
from cluster.gateway.models.known_model import KnownModel
from cluster.gateway.scheduling.scheduler import Scheduler
from cluster.gateway.text.tokenizer import TextModel
from cluster.gateway.tracing.call_trace import CallTrace
from cluster.gateway.tracing.tracer import Tracer
from cluster.observe.log import ids_of_call
from cluster.policy.routing.rendezvous import hash64
from cluster.policy.routing.version_split import Versions
from cluster.policy.tenants.policy import TenantPolicy

FALLBACK_LABEL = "fallback_for"
"""Name of a label of usage records. If a fallback model served the call, the label holds the requested model's name."""


@dataclass(slots=True)
class CallOpening:
    """The state of a call that is being opened. The methods are the steps of the opening, in the order in which they
    are taken. They raise CallError."""

    meta: CallMeta
    arrived: float
    model_name: str = field(init=False, default="")
    requested: KnownModel = field(init=False)
    model: KnownModel = field(init=False)
    """The model that serves the call: the requested model or a fallback model."""
    versions: Versions = field(init=False)
    text: TextModel = field(init=False)
    max_model_len: int = field(init=False, default=0)
    call: Call | None = field(init=False, default=None)
    trace_id: str = field(init=False, default="")
    """See Call."""
    trace: CallTrace | None = field(init=False, default=None)
    """See Call."""

    def __post_init__(self) -> None:
        self.trace_id = self.meta.trace_id

    @property
    def log_fields(self) -> Mapping[str, str]:
        """Fields of log lines about the call."""
        return ids_of_call(self.meta.request_id, self.trace_id)

    @property
    def is_fallback(self) -> bool:
        """Whether a fallback model serves the call."""
        return self.model is not self.requested

    @property
    def bundle_digest(self) -> str:
        """Digest of the tokenizer bundle: the tokenizer files of the call's model."""
        return self.versions.bundle_digest or self.model.versions.bundle_digest(self.versions.first)

    @property
    def longest_context(self) -> int:
        """Maximum context length of the call in tokens: the smaller of the model's limit and the tenant's limit. 0 as
        long as the model's limit is unknown."""
        longest, of_tenant = self.model.capabilities.max_model_len, self.meta.principal.tenant.max_context_tokens
        return min(longest, of_tenant) if of_tenant else longest

    def begin_trace(self, tracer: Tracer, traceparent: str) -> None:
        """If the call is sampled, begin the record of the call's spans and set the call's trace id. `traceparent`: the
        caller's trace context or, for a resumed call, the trace context of the call at its first gateway."""
        self.trace = tracer.begin(traceparent, self.meta.trace_state, self.arrived)
        if self.trace is not None:
            self.trace_id = self.trace.trace_id

    def call_fields(
        self,
        kind: str,
        priority_class: str,
        metadata: Mapping[str, str],
        scheduler: Scheduler,
        clock: Callable[[], float],
    ) -> dict[str, Any]:
        """Return the constructor arguments of Call that all kinds of calls share. `kind`: prefix of the call's id.
        `priority_class` and `metadata`: the values of these two fields in the request."""
        meta, policy = self.meta, _policy_of(self.meta, priority_class, scheduler)
        return {
            "id": f"{kind}-{random_id()}",
            "model": self.model.name,
            "policy": policy,
            "rank": scheduler.charges.rank_of(policy.priority_class),
            "arrived": self.arrived,
            "deadline": meta.deadline,
            "clock": clock,
            "events": scheduler.events,
            "request_id": meta.request_id,
            "api": meta.api,
            "counted": meta.counted,
            "versions": self.versions,
            "bundle_digest": self.bundle_digest,
            "labels": {**metadata, **policy.labels, **self._fallback_label()},
            "key_id": meta.principal.subject if meta.principal.by == "key" else "",
            "trace_id": self.trace_id,
            "trace": self.trace,
        }

    def _fallback_label(self) -> Mapping[str, str]:
        """Return a label for usage records with the name of the requested model, if a fallback model serves the call;
        else no label."""
        return {FALLBACK_LABEL: self.requested.name} if self.is_fallback else {}

    def affinity(self, key: str, flow: str) -> int:
        """Return a hash of the tenant and the affinity key; 0 without a key. `key`: the key in the request; if empty,
        the key in the header is used. `flow`: the tenant's key in fair queues (TenantPolicy.flow). Raises CallError for
        an affinity key that is too long."""
        name = "affinity_key"
        if not key:
            name, key = "x-headrace-affinity", self.meta.affinity_key
        if not key:
            return 0
        if len(key) > requests.MAX_AFFINITY_CHARS:
            raise invalid(name, f"must have at most {requests.MAX_AFFINITY_CHARS} characters; has {len(key)}")
        return max(hash64(f"{flow}\0{key}"), 1)


def not_prepared(model: KnownModel) -> CallError:
    """Return the error for a model whose properties are not known yet."""
    return CallError(Outcome.MODEL_LOADING, f"model {model.name} is still being prepared; retry later")


def _policy_of(meta: CallMeta, priority_class: str, scheduler: Scheduler) -> TenantPolicy:
    """Return the policy of a caller's tenant. If the request names a priority class, the policy has that class.

    A tenant may use its own class and all classes of lower priority. Raises CallError for a class of higher priority
    and for an unknown class.
    """
    policy = meta.principal.tenant
    if priority_class in ("", policy.priority_class):
        return policy
    allowed = scheduler.charges.classes_from(policy.priority_class)
    if priority_class not in allowed:
        raise invalid("priority", f"must be one of {', '.join(allowed)}; got {quoted(priority_class)}")
    return replace(policy, priority_class=priority_class)
