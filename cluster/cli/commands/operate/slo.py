"""The command `slo`, which prints how many calls of each tenant met the SLOs of their models in a month."""

from __future__ import annotations

import calendar
import re
import time
from typing import Annotated, Any

import typer

from cluster.cli.common import USAGE, JsonOption, fail, out, print_json
from cluster.cli.ledger import show_table
from cluster.cli.tenant_service import with_usage_reports
from cluster.ledger.rows import UsageQuery
from cluster.ledger.slo import MISSING, SOURCE, SloObjective, SloSum
from cluster.ledger.usage.reports import UsageReports

_MONTH = re.compile(r"(\d{4})-(0[1-9]|1[0-2])")


def days_of(month: str, now_s: float) -> tuple[str, str]:
    """Return the first and the last day of `month`, such as 2026-10. "" means the current month (UTC).

    Raises ValueError for a text of another form, and for a month that has not begun.
    """
    present = time.strftime("%Y-%m", time.gmtime(now_s))
    month = month or present
    match = _MONTH.fullmatch(month)
    if match is None or match[1] < "1970":
        raise ValueError(f"--month {month}: give a month like 2026-10")
    if month > present:
        raise ValueError(f"--month {month}: has not begun; the present month is {present} (UTC)")
    return f"{month}-01", f"{month}-{calendar.monthrange(int(match[1]), int(match[2]))[1]:02}"


@with_usage_reports()
def slo(
    reports: UsageReports,
    month: Annotated[str, typer.Option("--month", help="A month (UTC) like 2026-10.", show_default="this month")] = "",
    tenant: Annotated[str, typer.Option("--tenant", help="Only this tenant.")] = "",
    model: Annotated[str, typer.Option("--model", help="Only this model.")] = "",
    as_json: JsonOption = False,
) -> None:
    """Show the share of calls that met their model's SLO. Each row is a tenant and a model, with the error budget that
    is left. The data are usage records: they lack the calls that were refused before a worker accepted them."""
    try:
        first, last = days_of(month, time.time())
    except ValueError as error:
        fail(str(error), USAGE)
    query = UsageQuery((), since_day=first, until_day=last, tenant=tenant, model=model)
    sums = reports.slo(query)
    if as_json:
        rows = [each.as_json() for each in sums]
        print_json(
            {"month": first[:7], "since_day": first, "until_day": last, "source": SOURCE, "missing": MISSING}
            | {"sums": rows}
        )
        return
    show_table([_row(each) for each in sums], f"no calls in {first[:7]}")
    out.print()
    out.print(f"{first[:7]} (UTC) of {SOURCE}. Not in it:", markup=False)
    for sentence in MISSING:
        out.print(f"- {sentence}", markup=False)


def _row(each: SloSum) -> dict[str, Any]:
    missed = {"late": each.late_first_token, "slow": each.slow_tokens, "failed": each.failed}
    return {
        "tenant": each.tenant,
        "model": each.model,
        "objective": _objective(each.objective),
        "calls": each.calls,
        "good": each.met,
        "attainment": _percent(each.attainment, 3),
        "budget left": _percent(each.budget_left, 1),
        **missed,
        "not judged": each.not_judged + each.unknown,
    }


def _objective(objective: SloObjective | None) -> str:
    """Describe an SLO in words; "-" for None. A controller of an older release sends no target; the target is then
    described as unknown."""
    if objective is None:
        return "-"
    target = f"{objective.target:.4g}" if objective.target else "unknown share"
    return f"{target} within {objective.ttft_s:g} s, {objective.itl_s:g} s"


def _percent(share: float | None, digits: int) -> str:
    return "-" if share is None else f"{share * 100:.{digits}f} %"
