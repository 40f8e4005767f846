"""A call from arrival to end: what is known of the call, its sequences (one for each output), and their events."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, TypeAlias

import structlog

from cluster.api.adapters import full_name
from cluster.api.outcomes import CallError, Outcome
from cluster.api.types import TokenOutput, WorkerIdentity, weakest_resume_capability
from cluster.gateway.calls.call_output import CallOutput
from cluster.gateway.calls.call_usage import CallUsage
from cluster.gateway.calls.prompt_payment import PromptPayment
from cluster.gateway.calls.sequences.owner import CallEvents
from cluster.gateway.calls.sequences.sequence import OutputSequence
from cluster.gateway.models.adapters import name_of
from cluster.gateway.resume_tokens.claim import ResumeTerms
from cluster.gateway.resume_tokens.tokens import ResumeTokens
from cluster.gateway.tracing.call_trace import CallTrace
from cluster.observe.log import ids_of_call
from cluster.observe.metrics import Histogram
from cluster.policy.routing.version_split import Versions, begun_on
from cluster.policy.tenants.policy import TenantPolicy
from cluster.process.call_errors import is_call_failure

log = structlog.get_logger("calls")

CallSequence: TypeAlias = "OutputSequence[Call]"


@dataclass(eq=False, slots=True)  # slots: with this many attributes, each access through a dictionary would be slower
class Call:
    """A call from arrival to end. `rank` is the rank of the call's priority class. `arrived` and `deadline` are times
    of `clock`."""

    is_pooling: ClassVar[bool] = False
    """Whether the sequences of the call produce vectors instead of tokens (pooling_call.py)."""
    id: str
    model: str
    policy: TenantPolicy
    rank: int
    arrived: float
    deadline: float | None
    clock: Callable[[], float]
    events: CallEvents[CallSequence]
    itl: Histogram | None = None
    """Histogram of the time between tokens."""
    request_id: str = ""
    api: str = ""
    """Name of the API that received the call."""
    key_id: str = ""
    labels: Mapping[str, str] = field(default_factory=dict)
    """Labels for the usage records of the call."""
    versions: Versions = field(default_factory=Versions)
    """Model versions on which the first sequence may begin. The other sequences use the version on which the first
    sequence has begun."""
    bundle_digest: str = ""
    """Digest of the tokenizer bundle with which the prompt was encoded."""
    counted: bool = False
    """Whether the call is already counted as a request of the call's tenant."""
    prepaid_tokens: int = 0
    """Number of prompt tokens that were charged before the prompt was read."""
    tool_calls_before: int = 0
    """Number of tool calls in the chat's history."""
    adapter: str = ""
    """Name of the model's adapter that serves the call; "" for the model itself."""
    trace_id: str = ""
    """Id of the trace that the caller has named or that this gateway has begun for a sampled call; "" without one."""
    trace: CallTrace | None = None
    """Record for the spans of the call; None if the call is not sampled."""
    affinity: int = 0
    """Hash of the tenant and the call's affinity key, in [1, 2**64); 0 without a key."""
    began_at: WorkerIdentity | None = None
    """The worker that got the call's first Submit."""
    sequences: list[CallSequence] = field(default_factory=list)
    usage: CallUsage = field(default_factory=CallUsage)
    headers: Sequence[tuple[str, str]] = ()
    """Response headers, including the state of the tenant's limits at admission."""
    resume_tokens: ResumeTokens | None = None
    """Generator of the resume tokens in the call's chunks; None if the call is not resumable."""
    is_resumed: bool = False
    """Whether the call began at another gateway. The other gateway has already counted the prompt and the tokens that
    it has delivered."""
    blamed: bool = False
    """Whether the call may have crashed its workers. A blamed call must not be resumed."""
    first_token_at: float | None = None
    output: CallOutput = field(init=False)
    """The output of the call, which the call's API reads."""
    payment: PromptPayment = field(init=False, default_factory=PromptPayment)
    """Decides whether this gateway charges the prompt. After a resume, an engine may compute the prompt again."""

    def __post_init__(self) -> None:
        self.output = CallOutput(self.sequences, self.usage, self.arrived)

    @property
    def error(self) -> CallError | None:
        """The error with which the call has ended; None while the call runs and after a normal end."""
        return self.output.error

    @property
    def shown_model(self) -> str:
        """Name of the model or adapter that serves the call, as callers know it."""
        return full_name(self.model, self.adapter)

    @property
    def shown_id(self) -> str:
        """Call id that the caller knows. For a resumed call this is the id from the first gateway."""
        return self.resume_tokens.head.call_id if self.is_resumed and self.resume_tokens is not None else self.id

    @property
    def tenant(self) -> str:
        """Name of the call's tenant."""
        return self.policy.name

    @property
    def log_fields(self) -> Mapping[str, str]:
        """Fields of log lines about the call."""
        return ids_of_call(self.request_id, self.trace_id)

    @property
    def charged_prompt_tokens(self) -> int:
        """Number of prompt tokens that are charged to the tenant's limits. The number is 0 if the call failed before
        the first token, if no engine can have computed the prompt, or if `pays_prompt` is False."""
        is_computed = self.first_token_at is not None or self._may_be_computed
        return self.usage.prompt_tokens if is_computed and self.pays_prompt else 0

    @property
    def pays_prompt(self) -> bool:
        """Whether this gateway charges the prompt to the tenant."""
        return self.payment.is_due(self._may_be_computed)

    @property
    def _may_be_computed(self) -> bool:
        """Whether the call has no error and an engine may have computed its prompt."""
        return self.error is None and any(sequence.life.computed for sequence in self.sequences)

    # ---- operations of the service, the scheduler and the APIs

    def make_resumable(self, tokens: ResumeTokens) -> None:
        """Make the call resumable: from now on, its chunks contain the resume tokens that `tokens` generates."""
        self.resume_tokens = tokens

    def continue_from(self, request_id: str) -> None:
        """Mark the call as resumed: it began at another gateway, with the request id `request_id`."""
        self.is_resumed = True
        self.payment.resume(ResumeTerms.FREE)
        self.request_id = self.request_id and request_id

    def set_versions(self, versions: Versions) -> None:
        """Set the model versions on which the call may begin."""
        self.versions = versions

    def submitted(self, sequence: CallSequence, identity: WorkerIdentity, now: float) -> None:
        """Record that a sequence was sent to the worker `identity`. The call's other sequences may then begin only on
        the same version with the same weights: outputs or vectors of different weights must not be mixed."""
        if sequence.index == 0 and not sequence.emitted:
            self.usage.queue_s = now - self.arrived
        self.began_at = self.began_at or identity
        if self.versions.all or len(self.sequences) > 1:
            self.versions = begun_on(identity)

    def set_adapter(self, sequence: CallSequence, digest: str) -> None:
        """Set the adapter's digest in the request of a sequence that has no output yet. Needed if the digest was not
        known when the request was made, or has changed since."""
        sequence.set_adapter(digest)
        if (tokens := self.resume_tokens) is not None and not self.is_resumed:
            tokens.head = replace(tokens.head, adapter_digest="" if name_of(digest) else digest)

    def blame(self, error: CallError) -> None:
        """End the call with `error`, because the call may have crashed its workers."""
        self.blamed = True
        self.fail(error)

    def add_headers(self, headers: Sequence[tuple[str, str]]) -> None:
        """Add headers to the response of the call."""
        self.headers = (*self.headers, *headers)

    # ---- reports of its sequences

    def began(self, sequence: CallSequence, output: TokenOutput) -> None:
        """Handle the first output that a worker sends for a sequence."""
        cached = sequence.cached_at_worker(output)
        if sequence.route is not None:
            sequence.route.begin(cached, self.clock())
        if not sequence.emitted:
            if sequence.index == 0:
                self.usage.cached_tokens = cached
            self.events.began(sequence, cached)
        if sequence.link is not None:
            self.events.answered(sequence, sequence.link)
        self.payment.record_output(output.origin_lost)

    def progressed(self, sequence: CallSequence, tokens: int, now: float) -> None:
        """Handle an engine step that has added `tokens` tokens to a sequence. The fast paths for a single token
        (`OutputSequence.token`, `parsed_token`) do not call this method."""
        if self.first_token_at is None:
            self.first_token_at = now
            self.usage.ttft_s = now - self.arrived
        elif self.itl is not None and (last := sequence.last_token_at):
            self.itl.observe((now - last) / tokens)
        self.output.wake()

    def resumed(self, sequence: CallSequence, reason: str) -> None:
        """Handle the first token of a sequence after its resume on another worker."""
        self.usage.resumed += 1
        if sequence.link is not None:
            self.usage.resume = weakest_resume_capability(
                (self.usage.resume, weakest_resume_capability(sequence.link.info.capabilities))
            )
        self.events.resumed(self.model, reason, self.clock() - sequence.last_token_at)

    def reasoned(self, tokens: int) -> None:
        """Count reasoning tokens of a sequence that has ended."""
        self.usage.reasoning_tokens += tokens

    def fail(self, error: CallError) -> None:
        """End the call with this error and abort the running sequences. The method never raises, because the code that
        calls it serves other calls too."""
        self.output.fail(error)
        try:
            self.release()
            self.output.wake()
        except Exception:
            log.exception("call.not_notified", **self.log_fields)

    def fail_unexpectedly(self, error: BaseException) -> None:
        """End the call with the error INTERNAL, because work for this call raised `error`. If `error` is a cancellation
        or an exit, raise it again instead."""
        if not is_call_failure(error):
            raise error
        if self.error is None:
            log.error("call.failed", **self.log_fields, exc_info=error)
        message = f"unexpected failure; quote request id {self.request_id}"
        self.fail(CallError(Outcome.INTERNAL, message))

    def release(self) -> None:
        """End all sequences that have not ended, and abort them in their engines."""
        for sequence in self.sequences:
            sequence.end()
