"""The usage reports: read operations on usage, SLOs and the audit log, for the admin API and the command line.

`UsageReports` is the interface. `LedgerUsageReports` implements the interface on a database. The CLI's
`RemoteUsageReports` implements the interface over the admin API.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Protocol

from cluster.ledger.errors import LedgerError
from cluster.ledger.rows import Prices, UsageQuery
from cluster.ledger.slo import SloObjectives, SloSum
from cluster.ledger.usage.records import UsageRecord

if TYPE_CHECKING:
    from cluster.ledger.store import Ledger

PAGE = 1000


class UsageReports(Protocol):
    """Read operations on usage, SLOs and the audit log. Every operation may raise LedgerError or a subclass of it."""

    def usage(self, wanted: UsageQuery, rates: Prices | None = None, *, cost: bool = False) -> list[dict[str, Any]]:
        """Return usage sums by group. With `cost`, each group also has a cost.

        `rates`: prices from which the costs are computed; None means the prices of the ledger's configuration.
        """

    def records(self, wanted: UsageQuery) -> Iterator[UsageRecord]:
        """Return usage records in order of time."""

    def slo(self, wanted: UsageQuery, objectives: SloObjectives | None = None) -> list[SloSum]:
        """Return, for each tenant and model, how many calls met the model's SLO and how many missed it.
        `wanted.group_by` is ignored.

        `objectives`: the SLO of each model; None means the SLOs that the models are configured with.
        """

    def audit(
        self, *, tenant: str = "", equal: Mapping[str, str] | None = None, since_s: float = 0.0
    ) -> Iterator[dict[str, Any]]:
        """Return audit events, newest first."""


class LedgerUsageReports:
    """UsageReports on a database. The operations run in the caller's thread."""

    def __init__(
        self, ledger: Ledger, *, rates: Prices | None = None, objectives: Callable[[], SloObjectives] = dict
    ) -> None:
        """`rates`: prices from which costs are computed. `objectives` returns the SLOs by which `slo` judges calls."""
        self.ledger = ledger
        self._rates = rates
        self._objectives = objectives

    def usage(self, wanted: UsageQuery, rates: Prices | None = None, *, cost: bool = False) -> list[dict[str, Any]]:
        """Implements `UsageReports.usage`."""
        rates = rates or self._rates
        if cost and rates is None:
            raise LedgerError("cost: no rates are configured: set the configuration's cost section")
        return self.ledger.usage.query(wanted, rates if cost else None)

    def records(self, wanted: UsageQuery) -> Iterator[UsageRecord]:
        """Implements `UsageReports.records`."""
        after = None
        while page := self.ledger.usage.records(wanted, after=after, limit=PAGE):
            yield from page
            after = (page[-1].opened_at_s, page[-1].record_id)

    def slo(self, wanted: UsageQuery, objectives: SloObjectives | None = None) -> list[SloSum]:
        """Implements `UsageReports.slo`."""
        return self.ledger.slo.query(wanted, self._objectives() if objectives is None else objectives)

    def audit(
        self, *, tenant: str = "", equal: Mapping[str, str] | None = None, since_s: float = 0.0
    ) -> Iterator[dict[str, Any]]:
        """Implements `UsageReports.audit`."""
        before = None
        while page := self.ledger.audit.list(tenant=tenant, equal=equal, since_s=since_s, before=before, limit=PAGE):
            yield from page
            before = (page[-1]["at_s"], page[-1]["event_id"])
