"""The views of `headrace top`: their columns, and the rows of an overview document, sorted and filtered.

Everything here is pure. A document is untrusted: a field may be missing or None, and texts may hold control characters.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cluster.cli.terminal import safe

Row = Mapping[str, Any]
Document = Mapping[str, Any]
UNKNOWN = "-"
GAP = 2
"""Spaces between two columns."""


@dataclass(frozen=True, slots=True)
class Column:
    """A column: its title, the field of a row that is compared for sorting, and the text of a row's cell.

    `keep`: in a narrow terminal, the column is left out only after all columns without `keep`.
    """

    title: str
    field: str
    text: Callable[[Row], str]
    keep: bool = False
    is_number: bool = True


@dataclass(frozen=True, slots=True)
class View:
    """A page of the screen. The page shows the list `items` of the overview document. `sort`: index of the sort
    column.

    `sort` and `is_rising` (whether the order is ascending) apply until the user changes the order.
    """

    name: str
    items: str
    columns: tuple[Column, ...]
    sort: int = 0
    is_rising: bool = True


def items_of(document: Document, name: str) -> list[Row]:
    """Return the rows of a list in the document. The result is empty if the list is missing."""
    rows = document.get(name)
    return [row for row in rows if isinstance(row, Mapping)] if isinstance(rows, Sequence) else []


def text_of(value: Any) -> str:
    """Return a value as one line without control characters; `-` for a missing value."""
    if value is None or value == "":
        return UNKNOWN
    return " ".join(safe(str(value)).split())


def number(value: Any, digits: int = 0, unit: str = "") -> str:
    """Return a number with its unit; `-` for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return UNKNOWN
    return f"{value:,.{digits}f}{unit}"


def seconds(value: Any) -> str:
    """Return a duration in ms, s, min or h; `-` for a missing one."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return UNKNOWN
    if value < 1:
        return f"{value * 1000:.0f} ms"
    if value < 100:
        return f"{value:.1f} s"
    return f"{value / 60:.0f} min" if value < 6000 else f"{value / 3600:.1f} h"


def percent(value: Any) -> str:
    """Return a share as a percentage; `-` for a missing one."""
    return number(value * 100 if isinstance(value, int | float) and not isinstance(value, bool) else None, 0, " %")


def _field(name: str) -> Callable[[Row], str]:
    return lambda row: text_of(row.get(name))


def _number(name: str, digits: int = 0, unit: str = "") -> Callable[[Row], str]:
    return lambda row: number(row.get(name), digits, unit)


def _seconds(name: str) -> Callable[[Row], str]:
    return lambda row: seconds(row.get(name))


def _percent(name: str) -> Callable[[Row], str]:
    return lambda row: percent(row.get(name))


def _share_of(row: Row, part: str, whole: str) -> str:
    return f"{number(row.get(part))}/{number(row.get(whole))}"


def _words(title: str, field: str, keep: bool = False) -> Column:
    return Column(title, field, _field(field), keep, is_number=False)


def _model_state(row: Row) -> str:
    """Return the state of a model. While the model starts, its progress in percent follows the state."""
    progress = row.get("progress")
    fraction = progress.get("fraction") if isinstance(progress, Mapping) else None
    return text_of(row.get("state")) + ("" if fraction is None else f" {percent(fraction)}")


def _progress(row: Row) -> str:
    """Return the stage and the progress of a model that is starting; for other models, the reason for the state."""
    progress = row.get("progress")
    if isinstance(progress, Mapping):
        return f"{text_of(progress.get('stage'))} {percent(progress.get('fraction'))}"
    return text_of(row.get("reason"))


def _limits(row: Row) -> str:
    """Return the two limits of which the tenant has used the largest shares, each as `name used/limit`."""
    limits = row.get("limits")
    if not isinstance(limits, Mapping):
        return UNKNOWN
    parts = []
    for name, value in limits.items():
        used, limit = (value.get("used"), value.get("limit")) if isinstance(value, Mapping) else (None, None)
        if isinstance(used, int | float) and isinstance(limit, int | float) and limit > 0:
            parts.append((used / limit, f"{text_of(name)} {used:,.4g}/{limit:,.4g}"))
    return ", ".join(text for _, text in sorted(parts, reverse=True)[:2]) or UNKNOWN


def _budget(row: Row) -> str:
    budget = row.get("budget")
    if not isinstance(budget, Mapping):
        return UNKNOWN
    return f"{number(budget.get('used'), 2)}/{number(budget.get('limit'), 2)} {text_of(budget.get('currency'))}"


VIEWS: tuple[View, ...] = (
    View(
        "fleet",
        "models",
        (
            _words("model", "id", keep=True),
            Column("state", "state", _model_state, keep=True, is_number=False),
            Column(
                "ready", "ready_workers", lambda row: _share_of(row, "ready_workers", "replicas_desired"), keep=True
            ),
            Column("running", "running", _number("running"), keep=True),
            Column("waiting", "waiting", _number("waiting"), keep=True),
            Column("tokens/s", "tokens_per_s", _number("tokens_per_s"), keep=True),
            Column("TTFT p50", "ttft_p50_s", _seconds("ttft_p50_s")),
            Column("p99", "ttft_p99_s", _seconds("ttft_p99_s")),
            Column("cached", "cache_hit", _percent("cache_hit")),
            Column("note", "reason", _progress, is_number=False),
        ),
    ),
    View(
        "workers",
        "workers",
        (
            _words("worker", "id", keep=True),
            _words("model", "model"),
            _words("state", "state", keep=True),
            Column("running", "running", lambda row: _share_of(row, "running", "max_num_seqs"), keep=True),
            Column("waiting", "waiting", _number("waiting"), keep=True),
            Column("KV", "kv_usage", _percent("kv_usage"), keep=True),
            Column("step", "step_ms", _number("step_ms", 1, " ms")),
            Column("resumed", "resumed", _number("resumed")),
            Column("node", "node", lambda row: text_of(row.get("host") or row.get("node")), is_number=False),
            _words("GPU", "gpu"),
            _words("version", "version"),
            Column("lost", "lost_reason", _field("lost_reason"), is_number=False),
        ),
    ),
    View(
        "calls",
        "calls",
        (
            _words("call", "id", keep=True),
            _words("tenant", "tenant", keep=True),
            _words("model", "model"),
            Column(
                "state", "state", lambda row: text_of(row.get("outcome") or row.get("state")), True, is_number=False
            ),
            Column("queue", "queue_s", _seconds("queue_s"), keep=True),
            Column("TTFT", "ttft_s", _seconds("ttft_s"), keep=True),
            Column("tokens", "tokens", _number("tokens"), keep=True),
            Column("/s", "tokens_per_s", _number("tokens_per_s")),
            Column("prompt", "prompt_tokens", _number("prompt_tokens")),
            Column("cached", "cached_tokens", _number("cached_tokens")),
            Column("resumes", "resumes", _number("resumes")),
            _words("worker", "worker"),
            _words("reason", "reason"),
            Column("arrived", "arrived_s", lambda row: clock_of(row.get("arrived_s")), is_number=False),
        ),
        sort=13,
        is_rising=False,
    ),
    View(
        "tenants",
        "tenants",
        (
            _words("tenant", "id", keep=True),
            Column("weight", "weight", _number("weight", 1)),
            Column("running", "running", _number("running"), keep=True),
            Column("waiting", "waiting", _number("waiting"), keep=True),
            Column("tokens/s", "tokens_per_s", _number("tokens_per_s"), keep=True),
            Column("share", "share", _percent("share"), keep=True),
            Column("fair", "fair_share", _percent("fair_share"), keep=True),
            Column("gap", "gap", _number("gap", 2)),
            Column("calls", "requests", _number("requests")),
            Column("cost/h", "cost_per_h", _number("cost_per_h", 2)),
            Column("limits", "limits", _limits, is_number=False),
            Column("budget", "budget", _budget, is_number=False),
        ),
        sort=4,
        is_rising=False,
    ),
    View(
        "scaling",
        "scaling",
        (
            _words("model", "id", keep=True),
            Column("wanted", "wanted", _number("wanted"), keep=True),
            Column("had", "had", _number("had"), keep=True),
            Column("frozen", "frozen", lambda row: "frozen" if row.get("frozen") else "", keep=True, is_number=False),
            Column("decision", "reason", _field("reason"), keep=True, is_number=False),
        ),
    ),
)


def clock_of(at_s: Any) -> str:
    """Return the time of day of an epoch time, in the zone of the terminal; `-` for a missing one."""
    if isinstance(at_s, bool) or not isinstance(at_s, int | float):
        return UNKNOWN
    try:
        return time.strftime("%H:%M:%S", time.localtime(at_s))
    except (OverflowError, ValueError, OSError):
        return UNKNOWN


def selected(document: Document, view: View, sort: int, is_rising: bool, wanted: str) -> list[Row]:
    """Return the rows of a view that contain the text `wanted` in a cell.

    `sort`: index of the column by which the rows are sorted. Rows without a value in this column come last.
    """
    column = view.columns[sort]
    rows = items_of(document, view.items)
    if wanted:
        low = wanted.lower()
        rows = [row for row in rows if any(low in each.text(row).lower() for each in view.columns)]
    known = [row for row in rows if _is_sortable(row.get(column.field))]
    known.sort(key=lambda row: text_of(row.get("id")))
    known.sort(key=lambda row: _rank(row[column.field]), reverse=not is_rising)
    return known + [row for row in rows if not _is_sortable(row.get(column.field))]


def _is_sortable(value: Any) -> bool:
    return isinstance(value, str | int | float) and value != ""


def _rank(value: str | int | float) -> tuple[int, float, str]:
    return (1, 0.0, value.lower()) if isinstance(value, str) else (0, float(value), "")


def fitting(columns: Sequence[Column], cells: Sequence[Sequence[str]], width: int) -> list[int]:
    """Return the indices of the columns that fit into a width, in order. The first column is never left out.

    First the columns without `keep` are left out, from right to left, then the columns with `keep`, from right to left.
    """
    widths = [max([len(column.title) + 2, *(len(row[at]) for row in cells)]) + GAP for at, column in enumerate(columns)]
    shown = list(range(len(columns)))
    for is_kept in (False, True):
        for at in reversed(range(1, len(columns))):
            if sum(widths[each] for each in shown) - GAP <= width:
                return shown
            if columns[at].keep is is_kept and not _is_last_text(columns, at, shown, widths, width):
                shown.remove(at)
    return shown


def _is_last_text(columns: Sequence[Column], at: int, shown: Sequence[int], widths: Sequence[int], width: int) -> bool:
    """Return whether the column `at` may stay although its texts are cut off. A column may stay if it is the last shown
    column, contains texts instead of numbers, and has room for at least 16 characters."""
    others = sum(widths[each] for each in shown if each != at)
    return not columns[at].is_number and at == shown[-1] and width - others >= 16
