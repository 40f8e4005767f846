"""Commands about what was used, and who did what: usage, audit."""

from __future__ import annotations

import time
from collections.abc import Sequence
from itertools import islice
from typing import Annotated

import typer

from cluster.cli import terminal
from cluster.cli.common import USAGE, JsonOption, fail, print_json
from cluster.cli.ledger import DAY_S, pair, show_table, shown_time
from cluster.cli.tenant_service import at_desk
from cluster.config.tenants import Cost
from cluster.ledger.rows import Prices, UsageQuery
from cluster.ledger.tenants.service import TenantService
from cluster.ledger.usage import export


@at_desk()
def usage(
    desk: TenantService,
    group_by: Annotated[
        str, typer.Option("--group-by", help="tenant, model, day, month, key_id, label:x, …; commas between.")
    ] = "tenant,model",
    since: Annotated[str, typer.Option("--since", help="First day, UTC, like 2026-11-01.")] = "",
    until: Annotated[str, typer.Option("--until", help="Last day, included.")] = "",
    tenant: Annotated[str, typer.Option("--tenant", help="Of one tenant only.")] = "",
    model: Annotated[str, typer.Option("--model", help="Of one model only.")] = "",
    cost: Annotated[bool, typer.Option("--cost", help="Price GPU-seconds by the file's cost section.")] = False,
    gpu_hour: Annotated[list[str] | None, typer.Option("--gpu-hour", help="A rate: H100=2.40; repeats.")] = None,
    currency: Annotated[str, typer.Option("--currency", help="Of --gpu-hour.")] = "EUR",
    records: Annotated[bool, typer.Option("--records", help="Single calls in place of sums.")] = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="Print CSV.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Sum what tenants have used."""
    rates = _rates(gpu_hour, currency) if gpu_hour else None
    names = tuple(part.strip() for part in group_by.split(",") if part.strip())
    wanted = UsageQuery(names, since_day=since, until_day=until, tenant=tenant, model=model)
    if records:
        rows = [one.as_json() for one in desk.records(wanted)]
    else:
        rows = desk.usage(wanted, rates, cost=cost or rates is not None)
    if as_csv:
        terminal.write(export.as_csv(rows))
    elif as_json:
        print_json(list(rows))
    else:
        show_table(rows, "no usage")


def _rates(given: Sequence[str], currency: str) -> Prices:
    try:
        hours = {gpu: float(rate) for gpu, rate in (pair(one, "--gpu-hour") for one in given)}
        checked = Cost(currency=currency, gpu_hour=hours)
    except ValueError as error:
        fail(f"--gpu-hour: {error}", USAGE)
    return Prices(checked.currency, dict(checked.gpu_hour))


@at_desk()
def audit(
    desk: TenantService,
    tenant: Annotated[str, typer.Option("--tenant", help="Of one tenant only.")] = "",
    kind: Annotated[str, typer.Option("--kind", help="admin, auth_failure or policy.")] = "",
    since_days: Annotated[float, typer.Option("--since-days", help="Of the last days.", min=0)] = 30.0,
    limit: Annotated[int, typer.Option("--limit", help="At most so many, newest first.", min=1, max=100_000)] = 100,
    as_json: JsonOption = False,
) -> None:
    """Show who did what and why, newest first."""
    since_s = max(time.time() - since_days * DAY_S, 0.0)
    equal = {"kind": kind} if kind else {}
    rows = list(islice(desk.audit(tenant=tenant, equal=equal, since_s=since_s), limit))
    if as_json:
        print_json(rows)
        return
    names = ("action", "actor", "object", "outcome", "reason")
    show_table([{"at": shown_time(row["at_s"]), **{name: row[name] for name in names}} for row in rows], "no events")
