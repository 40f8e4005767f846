"""Periodic check of all tenants' budgets against the usage in the ledger. The check updates the metric
`budget_used_ratio`, calls the webhook, and provides the token sums from which a restarted gateway continues.

Calls never wait for the check: a thread queries the database every INTERVAL_S, or less often if queries are slow. While
the database is unreachable, the metric keeps its last ratios and no notices are sent. If a threshold is crossed during
this time, its notice is sent afterwards. Valkey is not needed, because budgets are measured by the usage that the
ledger has recorded, not by reservations.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime

import structlog

from cluster.api.outcomes import CallError
from cluster.config.tenants import BudgetWebhook
from cluster.gateway.quotas.webhook import NotDelivered, post
from cluster.ledger.errors import LedgerError
from cluster.ledger.store import Ledger
from cluster.ledger.usage.budget_notices import ClaimedNotice
from cluster.observe.metrics import Metrics, Sample
from cluster.policy.limits.budgets import BudgetUse, budgets, crossed, day_name
from cluster.policy.tenants.policy import TenantPolicy

log = structlog.get_logger("budgets")

INTERVAL_S = 10.0
PART_OF_TIME = 20
"""Queries may take at most 1/PART_OF_TIME of the time."""
PAST_DAYS_S = 3600.0
"""Interval in seconds at which past days are summed again, since records may arrive late."""
SumsCallback = Callable[[Mapping[str, int], Mapping[str, int], float], None]


class BudgetWatch:
    """The periodic budget check of one gateway process. Without `webhook` no notices are sent."""

    def __init__(
        self,
        cluster: str,
        ledger: Ledger,
        policies: Callable[[], Sequence[TenantPolicy]],
        metrics: Metrics,
        on_sums: SumsCallback,
        *,
        webhook: BudgetWebhook | None = None,
        secret: bytes = b"",
        max_tenants: int = 500,
        interval_s: float = INTERVAL_S,
        wall: Callable[[], float] = time.time,
    ) -> None:
        """`policies`: returns the policies of all tenants and may raise CallError. `on_sums`: gets the tokens of the
        day and of the month, both keyed by tenant, and the time in seconds since the Unix epoch. `max_tenants`: bound
        on the metric of budget use. The metric has at most twice this number of samples; if there are more budgets,
        those with the highest use are exported."""
        self._cluster = cluster
        self._ledger = ledger
        self._policies = policies
        self._metrics = metrics
        self._on_sums = on_sums
        self._webhook = webhook
        self._secret = secret
        self._max_tenants = max_tenants
        self._interval_s = interval_s
        self._wall = wall
        self._uses: list[BudgetUse] = []
        self._past_days: dict[str, int] = {}
        self._past_days_key: tuple[str, frozenset[str]] = ("", frozenset())
        self._past_days_at = -float("inf")
        self._error = ""

    @property
    def uses(self) -> Sequence[BudgetUse]:
        """The use of each budget at the last check, highest first."""
        return self._uses

    async def run(self) -> None:
        """Query the ledger periodically. Runs until cancelled."""
        while True:
            began = time.monotonic()
            try:
                sums = await asyncio.to_thread(self.check)
                if sums is not None:
                    self._on_sums(*sums)
            except Exception:  # the next check must still run
                log.exception("budget.use_not_read")
            took_s = time.monotonic() - began
            await asyncio.sleep(max(self._interval_s, PART_OF_TIME * took_s))

    def check(self) -> tuple[Mapping[str, int], Mapping[str, int], float] | None:
        """Sum the usage, record crossed thresholds and send due notices. Blocks until all of this is done.

        Returns the sums of the day, the sums of the month and the time; None while the database is unreachable."""
        try:
            policies = [
                policy for policy in self._policies() if policy.limits.daily_tokens or policy.limits.monthly_tokens
            ]
            now_s = self._wall()
            today, month = self._sums(frozenset(policy.name for policy in policies), now_s)
            self._uses = sorted(budgets(policies, today, month, now_s), key=lambda use: -use.ratio)
            if self._webhook is not None:
                self._ledger.notices.insert_new(crossed(self._uses, self._webhook.thresholds), now_s)
                for taken in self._ledger.notices.claim_due(now_s):
                    self._send(self._webhook, taken)
        except (LedgerError, CallError) as error:
            if str(error) != self._error:
                log.warning("budget.use_not_read", error=str(error))
            self._error = str(error)
            return None
        self._error = ""
        return today, month, now_s

    def gauges(self) -> Iterator[Sample]:
        """Yield the samples of the metric `budget_used_ratio`."""
        for use in self._uses[: 2 * self._max_tenants]:
            yield "budget_used_ratio", (use.tenant, use.budget), use.ratio

    def _sums(self, names: frozenset[str], now_s: float) -> tuple[dict[str, int], dict[str, int]]:
        if not names:
            return {}, {}
        day, usage = day_name(now_s), self._ledger.usage
        if self._past_days_key != (day, names) or now_s - self._past_days_at >= PAST_DAYS_S:
            self._past_days = usage.tokens_since(f"{day[:7]}-01", names, before_day=day)
            self._past_days_key, self._past_days_at = (day, names), now_s
        today, past = usage.tokens_since(day, names), self._past_days
        return today, {name: past.get(name, 0) + today.get(name, 0) for name in {*past, *today}}

    def _send(self, webhook: BudgetWebhook, taken: ClaimedNotice) -> None:
        notice, use = taken.notice, taken.notice.use
        body = {
            "id": notice.id,
            "event": "budget.threshold",
            "cluster": self._cluster,
            "tenant": use.tenant,
            "budget": use.budget,
            "period": use.period,
            "threshold": notice.threshold,
            "used_tokens": use.used_tokens,
            "limit_tokens": use.limit_tokens,
            "noticed_at": datetime.fromtimestamp(taken.noticed_at_s, UTC).isoformat(timespec="seconds"),
            "attempt": taken.attempts,
        }
        try:
            post(webhook.url, self._secret, "budget.threshold", notice.id, body, self._wall())
        except NotDelivered as error:
            self._metrics.count("budget_webhook_total", "failed")
            log.warning("budget.notice_not_sent", id=notice.id, attempt=taken.attempts, error=str(error))
            return
        self._ledger.notices.mark_delivered(notice.id, self._wall())
        self._metrics.count("budget_webhook_total", "delivered")
        log.info("budget.notice_sent", id=notice.id, tenant=use.tenant, budget=use.budget, threshold=notice.threshold)

    def __repr__(self) -> str:
        return f"BudgetWatch({len(self._uses)} budgets)"
