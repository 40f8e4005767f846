"""Commands about what was used, and who did what: usage, audit."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cluster.cli.common import USAGE, JsonOption, fail, print_json
from cluster.cli.ledger import DAY_S, PAGE, ConfigOption, UrlOption, opened, pair, settings, show_table, shown_time
from cluster.config_tenants import Cost

if TYPE_CHECKING:
    from cluster.ledger.store import Ledger
    from cluster.ledger.usage import Rates


def usage(
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
    file: ConfigOption = None,
    database_url: UrlOption = None,
) -> None:
    """Sum what tenants have used."""
    from cluster.ledger import export
    from cluster.ledger.usage import UsageQuery

    chosen = settings(file, database_url)
    rates = _rates(chosen.cost, gpu_hour or [], currency) if cost or gpu_hour else None
    with opened(chosen) as ledger:
        names = tuple(part.strip() for part in group_by.split(",") if part.strip())
        wanted = UsageQuery(names, since_day=since, until_day=until, tenant=tenant, model=model)
        rows = _all_records(ledger, wanted) if records else ledger.usage.query(wanted, rates)
    if as_csv:
        typer.echo(export.as_csv(rows), nl=False)
    elif as_json:
        typer.echo(export.as_json(rows), nl=False)
    else:
        show_table(rows, "no usage")


def _all_records(ledger: Ledger, wanted: Any) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    after = None
    while page := ledger.usage.records(wanted, after=after, limit=PAGE):
        rows += [one.as_json() for one in page]
        after = (page[-1].opened_at_s, page[-1].record_id)
    return rows


def _rates(cost: Cost | None, given: Sequence[str], currency: str) -> Rates:
    from cluster.ledger.usage import Rates

    if not given:
        if cost is None:
            fail("--cost needs rates: a cost section in the file (-f), or --gpu-hour", USAGE)
        return Rates(cost.currency, dict(cost.gpu_hour))
    try:
        hours = {gpu: float(rate) for gpu, rate in (pair(one, "--gpu-hour") for one in given)}
        checked = Cost(currency=currency, gpu_hour=hours)
    except ValueError as error:
        fail(f"--gpu-hour: {error}", USAGE)
    return Rates(checked.currency, dict(checked.gpu_hour))


def audit(
    tenant: Annotated[str, typer.Option("--tenant", help="Of one tenant only.")] = "",
    kind: Annotated[str, typer.Option("--kind", help="admin, auth_failure or policy.")] = "",
    since_days: Annotated[float, typer.Option("--since-days", help="Of the last days.", min=0)] = 30.0,
    limit: Annotated[int, typer.Option("--limit", help="At most so many, newest first.", min=1, max=100_000)] = 100,
    as_json: JsonOption = False,
    file: ConfigOption = None,
    database_url: UrlOption = None,
) -> None:
    """Show who did what and why, newest first."""
    with opened(settings(file, database_url)) as ledger:
        since_s = time.time() - since_days * DAY_S
        rows = ledger.audit.list(tenant=tenant, kind=kind, since_s=since_s, limit=limit)
    if as_json:
        print_json(rows)
        return
    names = ("action", "actor", "object", "outcome", "reason")
    show_table([{"at": shown_time(row["at_s"]), **{name: row[name] for name in names}} for row in rows], "no events")
