"""The screen of `headrace top`, computed from an overview document, its age, and the state that keys change."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Group, RenderableType
from rich.layout import Layout
from rich.table import Table
from rich.text import Text

from cluster.cli.top.keys import HELP, TopState
from cluster.cli.top.views import (
    VIEWS,
    Column,
    Document,
    Row,
    View,
    clock_of,
    fitting,
    items_of,
    number,
    seconds,
    selected,
    text_of,
)

HEAD_LINES = 3
STYLES = {
    "READY": "green",
    "UP": "green",
    "ok": "green",
    "LOST": "bold red",
    "FAILED": "bold red",
    "DRAINING": "yellow",
    "CORDONED": "yellow",
    "resuming": "yellow",
    "queued": "yellow",
}


@dataclass(frozen=True, slots=True)
class Picture:
    """The newest overview document, and its age in seconds. `error`: why the last read of the overview failed; "" if it
    succeeded."""

    document: Document
    age_s: float = 0.0
    error: str = ""


def screen(picture: Picture, state: TopState, width: int, height: int) -> Layout:
    """Return the whole screen: a head, the rows of the view, and a line of keys."""
    layout = Layout()
    body = max(height - HEAD_LINES - 1, 1)
    content = _help() if state.is_helping else table(picture.document, state, width, body)
    layout.split_column(
        Layout(Group(*head(picture, state)), name="head", size=HEAD_LINES),
        Layout(content, name="body"),
        Layout(_foot(state), name="foot", size=1),
    )
    return layout


def head(picture: Picture, state: TopState) -> list[Text]:
    """Return the lines about the cluster as a whole, and the list of views."""
    document = picture.document
    workers, models = items_of(document, "workers"), items_of(document, "models")
    parts = [
        f"{text_of(document.get('cluster'))}  {clock_of(document.get('at'))}",
        f"{_sum(models, 'tokens_per_s')} tokens/s",
        f"{_sum(models, 'running')} running",
        f"{_sum(models, 'waiting')} waiting",
        f"{sum(row.get('state') == 'READY' for row in workers)} of {len(workers)} workers ready",
    ]
    first = Text("  ".join(parts), no_wrap=True, overflow="ellipsis")
    first.stylize("bold", 0, len(parts[0]))
    second = _state_line(picture, state)
    tabs = Text(no_wrap=True, overflow="ellipsis")
    for at, view in enumerate(VIEWS):
        tabs.append(f" {at + 1} {view.name} ", "reverse" if at == state.view else "")
        tabs.append(" ")
    at, is_rising = state.sort
    tabs.append(f"{_mark(is_rising)} {state.page.columns[at].title}  ", "dim")
    if state.typed is not None:
        tabs.append(f"/{state.typed}▏", "bold")
    elif state.wanted:
        tabs.append(f"filter: {state.wanted}", "yellow")
    return [first, second, tabs]


def _state_line(picture: Picture, state: TopState) -> Text:
    """Return a line about the state of the controller and the gateways. If the last read of the overview failed, the
    line has the error instead."""
    document = picture.document
    line = Text(no_wrap=True, overflow="ellipsis")
    if picture.error:
        line.append(f"no answer for {seconds(picture.age_s)}: {text_of(picture.error)}", "bold red")
        return line
    if state.is_paused:
        line.append("paused  ", "bold yellow")
    if problems := items_of(document, "problems"):
        worst = problems[0]
        style = "bold red" if worst.get("hurts") == "callers" else "yellow"
        more = f" and {len(problems) - 1} more" if len(problems) > 1 else ""
        line.append(f"{text_of(worst.get('summary'))}{more} (`headrace status`)  ", style)
    gateways = items_of(document, "gateways")
    if gateways:
        lags = [row["lag_ms"] for row in gateways if isinstance(row.get("lag_ms"), int | float)]
        lag = f", lag {number(max(lags), 1, ' ms')}" if lags else ""
        line.append(f"{len(gateways)} gateway processes, {_sum(gateways, 'streams')} streams{lag}")
    return line


def table(document: Document, state: TopState, width: int, height: int) -> RenderableType:
    """Return the rows of the shown view that fit into `width` columns and `height` lines."""
    view, (sort, is_rising) = state.page, state.sort
    rows = selected(document, view, sort, is_rising, state.wanted if state.typed is None else state.typed)
    if not rows:
        return Text(_nothing(document, view, state), "dim")
    room = max(height - 1, 1)
    top = min(state.top, max(len(rows) - room, 0))
    shown = rows[top : top + room]
    cells = [[column.text(row) for column in view.columns] for row in shown]
    return _table(view.columns, cells, fitting(view.columns, cells, width), sort, is_rising)


def _nothing(document: Document, view: View, state: TopState) -> str:
    if items_of(document, view.items):
        return f"no row contains {state.wanted or state.typed!r}: Esc removes the filter"
    if view.items not in document:
        return f"the gateway shows no {view.name} to this key"
    return {"fleet": "no models", "workers": "no workers are linked", "calls": "no calls"}.get(view.name, "nothing yet")


def _table(
    columns: Sequence[Column], cells: Sequence[Sequence[str]], shown: Sequence[int], sort: int, is_rising: bool
) -> Table:
    found = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), expand=False, header_style="bold")
    for at in shown:
        column = columns[at]
        mark = f" {_mark(is_rising)}" if at == sort else ""
        justify = "right" if column.is_number else "left"
        found.add_column(Text(column.title + mark), justify=justify, no_wrap=True, overflow="ellipsis")  # type: ignore[arg-type]
    for row in cells:
        found.add_row(*(Text(row[at], STYLES.get(row[at], "")) for at in shown))
    return found


def _mark(is_rising: bool) -> str:
    return "▲" if is_rising else "▼"


def _help() -> Table:
    found = Table("key", "effect", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for keys, effect in HELP:
        found.add_row(Text(keys, "bold"), Text(effect))
    return found


def _foot(state: TopState) -> Text:
    keys = "Enter applies the filter, Esc leaves it" if state.typed is not None else "any key goes back"
    if state.typed is None and not state.is_helping:
        keys = "q quit  tab view  s sort  r reverse  / filter  j k scroll  space pause  ? help"
    return Text(keys, "dim", no_wrap=True, overflow="ellipsis")


def _sum(rows: Sequence[Row], field: str) -> str:
    values = [row[field] for row in rows if isinstance(row.get(field), int | float)]
    return number(sum(values)) if values else "-"


def plain_picture(document: Document, width: int) -> list[RenderableType]:
    """Return all views, one below the other, for an output that is not a terminal."""
    parts: list[RenderableType] = list(head(Picture(document), TopState())[:2])
    for at, view in enumerate(VIEWS):
        if view.items in document:
            parts += [Text(), Text(view.name, "bold"), table(document, TopState(view=at), width, 1_000_000)]
    return parts
