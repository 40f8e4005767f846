"""The decisions of guards about one call. At the end of the call the decisions are counted, and the audit log gets one
event for each guard and outcome."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import structlog

from cluster.policy.tenants.policy import GuardRule, TenantPolicy

log = structlog.get_logger("guards")

MAX_AUDIT_TEXTS = 10
"""Upper bound on the number of matched texts in one audit event, for policies that keep matched texts."""
_OUTCOMES = {"redact": "redacted", "refuse": "refused", "flag": "flagged"}


@dataclass(frozen=True, slots=True)
class GuardDecision:
    """A guard's decision about one call. `matches`: number of matches, keyed by the name of the pattern or limit.
    `texts`: the first matched texts, if the tenant's policy sets `log_prompts`."""

    tenant: str
    model: str
    request_id: str
    actor: str
    guard: str
    outcome: str
    matches: dict[str, int]
    texts: tuple[str, ...]


class GuardDecisions:
    """The decisions that the guards of one call have made so far."""

    def __init__(
        self, policy: TenantPolicy, model: str, request_id: str, actor: str, log_fields: Mapping[str, str]
    ) -> None:
        """`actor`: the caller's name in audit events. `log_fields`: fields of log lines about the call."""
        self._policy = policy
        self._model = model
        self._request_id = request_id
        self._actor = actor
        self._log_fields = log_fields
        self._counts: dict[tuple[str, str], Counter[str]] = {}
        self._texts: dict[tuple[str, str], list[str]] = {}

    def add_matches(self, rule: GuardRule, counts: Mapping[str, int], texts: Sequence[str] = ()) -> None:
        """Add matches of a guard. `counts`: number of matches, keyed by the name of the pattern or limit. `texts`: the
        matched texts."""
        for name, count in counts.items():
            self.add_outcome(rule, _OUTCOMES[rule.action], name, count)
        if texts and self._policy.log_prompts:
            kept = self._texts.setdefault((guard_name(rule), _OUTCOMES[rule.action]), [])
            kept += texts[: max(MAX_AUDIT_TEXTS - len(kept), 0)]

    def add_outcome(self, rule: GuardRule, outcome: str, name: str, count: int = 1) -> None:
        """Add an outcome of a guard. `name`: the cause of the outcome, such as a pattern or a guard server's
        finding."""
        self._counts.setdefault((guard_name(rule), outcome), Counter())[name] += count

    def add_failure(self, rule: GuardRule, error: Exception) -> bool:
        """Add and log the failure of a guard. Returns True if the guard fails open, so the call continues without this
        guard."""
        fails_open = rule.fail == "open"
        why = str(error) if isinstance(error, ValueError | OSError) else type(error).__name__
        log.warning("guard.failed", **self._log_fields, tenant=self._policy.name, guard=guard_name(rule), error=why)
        self.add_outcome(rule, "failed_open" if fails_open else "failed_closed", "failure")
        return fails_open

    def pop_all(self) -> Iterator[GuardDecision]:
        """Yield the recorded decisions about the call, one for each guard and outcome, and forget them."""
        counts, self._counts = self._counts, {}
        for (guard, outcome), matches in counts.items():
            texts = tuple(self._texts.get((guard, outcome), ()))
            yield GuardDecision(
                self._policy.name, self._model, self._request_id, self._actor, guard, outcome, dict(matches), texts
            )


def guard_name(rule: GuardRule) -> str:
    """Return the name of a guard for metrics, audit and errors. The address of a guard server is not part of the
    name."""
    return f"{rule.on}_{rule.builtin or 'server'}"
