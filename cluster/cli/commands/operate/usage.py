"""The command `usage`, which prints the token usage of tenants, and `audit`, which prints the audit log."""

from __future__ import annotations

import time
from collections.abc import Sequence
from itertools import islice
from typing import Annotated

import typer

from cluster.cli import terminal
from cluster.cli.common import USAGE, JsonOption, fail, print_json
from cluster.cli.ledger import DAY_S, show_table, shown_time, split_pair
from cluster.cli.tenant_service import with_usage_reports
from cluster.config.tenants import Cost
from cluster.ledger.rows import DIMENSIONS, Prices, UsageQuery
from cluster.ledger.usage import export
from cluster.ledger.usage.reports import UsageReports


@with_usage_reports()
def usage(
    reports: UsageReports,
    group_by: Annotated[
        str,
        typer.Option(
            "--group-by",
            help=f"What to sum by, comma-separated: {', '.join(DIMENSIONS)}, label:NAME.",
        ),
    ] = "tenant,model",
    since: Annotated[str, typer.Option("--since", help="First day, UTC, like 2026-11-01.")] = "",
    until: Annotated[str, typer.Option("--until", help="Last day, inclusive.")] = "",
    tenant: Annotated[str, typer.Option("--tenant", help="Only this tenant.")] = "",
    model: Annotated[str, typer.Option("--model", help="Only this model.")] = "",
    cost: Annotated[
        bool,
        typer.Option(
            "--cost", help="Add the cost of the GPU-seconds, by the configuration's `cost` section or --gpu-hour."
        ),
    ] = False,
    gpu_hour: Annotated[
        list[str] | None,
        typer.Option(
            "--gpu-hour", help="A price an hour instead of the configuration's: H100=2.40; repeatable. Implies --cost."
        ),
    ] = None,
    currency: Annotated[str, typer.Option("--currency", help="The currency of --gpu-hour.")] = "EUR",
    records: Annotated[bool, typer.Option("--records", help="Single calls instead of sums.")] = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="Print CSV.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Show calls, tokens and GPU time of tenants, and the cost."""
    rates = _rates(gpu_hour, currency) if gpu_hour else None
    names = tuple(part.strip() for part in group_by.split(",") if part.strip())
    query = UsageQuery(names, since_day=since, until_day=until, tenant=tenant, model=model)
    if records:
        rows = [record.as_json() for record in reports.records(query)]
    else:
        rows = reports.usage(query, rates, cost=cost or rates is not None)
    if as_csv:
        terminal.write(export.as_csv(rows))
    elif as_json:
        print_json(list(rows))
    else:
        show_table(rows, "no usage")


def _rates(prices: Sequence[str], currency: str) -> Prices:
    try:
        hours = {gpu: float(rate) for gpu, rate in (split_pair(text, "--gpu-hour") for text in prices)}
        checked = Cost(currency=currency, gpu_hour=hours)
    except ValueError as error:
        fail(f"--gpu-hour: {error}", USAGE)
    return Prices(checked.currency, dict(checked.gpu_hour))


@with_usage_reports()
def audit(
    reports: UsageReports,
    tenant: Annotated[str, typer.Option("--tenant", help="Only this tenant.")] = "",
    kind: Annotated[str, typer.Option("--kind", help="admin, auth_failure or policy.")] = "",
    since_days: Annotated[float, typer.Option("--since-days", help="Only events of the last days.", min=0)] = 30.0,
    limit: Annotated[int, typer.Option("--limit", help="Maximum number of events.", min=1, max=100_000)] = 100,
    as_json: JsonOption = False,
) -> None:
    """Show the audit log, newest first: who did what, and why."""
    since_s = max(time.time() - since_days * DAY_S, 0.0)
    equal = {"kind": kind} if kind else {}
    rows = list(islice(reports.audit(tenant=tenant, equal=equal, since_s=since_s), limit))
    if as_json:
        print_json(rows)
        return
    names = ("action", "actor", "object", "outcome", "reason")
    show_table([{"at": shown_time(row["at_s"]), **{name: row[name] for name in names}} for row in rows], "no events")
