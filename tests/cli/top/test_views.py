"""The views of `top` sort, filter and cut the rows of any overview document."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from cluster.cli.top.keys import TopState, pressed, split_keys
from cluster.cli.top.screen import Picture, plain_picture, screen
from cluster.cli.top.views import VIEWS, items_of, seconds, selected, text_of
from cluster.policy.problems import Problem
from tests.support.overviews import overview


def lines_of(picture: Picture, state: TopState, width: int = 80, height: int = 24) -> list[str]:
    """Return the screen's lines on a terminal of `width` columns and `height` lines."""
    console = Console(width=width, height=height, force_terminal=True, color_system=None, legacy_windows=False)
    with console.capture() as capture:
        console.print(screen(picture, state, width, height), height=height)
    return capture.get().rstrip("\n").split("\n")


@pytest.mark.parametrize("size", [(80, 24), (40, 10), (200, 60)])
@pytest.mark.parametrize("view", range(len(VIEWS)))
def test_each_view_fits_the_terminal(view: int, size: tuple[int, int]) -> None:
    """Each view fills the terminal exactly, even with many more rows than lines. The last line lists the keys."""
    width, height = size
    lines = lines_of(Picture(overview(workers=300, calls=500, tenants=200)), TopState(view=view), width, height)
    assert len(lines) == height
    assert max(map(len, lines)) <= width
    assert lines[-1].startswith("q quit")
    assert VIEWS[view].columns[0].title in lines[3]


def test_the_fleet_at_80_columns() -> None:
    """A terminal of 80 columns shows the state and the load, and marks a lost worker.

    A terminal of 160 columns also shows the progress of a start.
    """
    text = "\n".join(lines_of(Picture(overview()), TopState()))
    assert "demo" in text
    assert "2 of 3 workers ready" in text
    assert "3/3" in text
    assert "51 ms" in text
    assert "LOST" in "\n".join(lines_of(Picture(overview()), TopState(view=1)))
    assert "downloading weights 40 %" in "\n".join(lines_of(Picture(overview()), TopState(), 160))
    assert "max_streams 9/10" in "\n".join(lines_of(Picture(overview()), TopState(view=3), 160))


def test_what_is_wrong_is_in_the_head() -> None:
    """The head of the screen names an unreachable gateway, else the worst problem and how many more there are."""
    document = overview()
    assert "no answer for 12.0 s: refused" in lines_of(Picture(document, 12.0, "refused"), TopState())[1]
    assert "1 gateway processes" in lines_of(Picture(document), TopState())[1]
    document["problems"] = [Problem("model_failed", "m", "", 1.0).row, Problem("ray_away", "local", "", 1.0).row]
    line = lines_of(Picture(document), TopState())[1]
    assert line.startswith("model m cannot start and 1 more")


def test_rows_are_sorted_and_missing_values_come_last() -> None:
    """A view can be sorted by a column in both directions. Rows without a value come last in either direction."""
    view = VIEWS[2]
    at = next(at for at, column in enumerate(view.columns) if column.field == "ttft_s")
    rising = [row["id"] for row in selected(overview(calls=3), view, at, True, "")]
    falling = [row["id"] for row in selected(overview(calls=3), view, at, False, "")]
    assert (rising, falling) == (
        ["chatcmpl-1", "chatcmpl-2", "chatcmpl-0"],
        ["chatcmpl-2", "chatcmpl-1", "chatcmpl-0"],
    )


def test_a_filter_keeps_rows_that_contain_it() -> None:
    """The filter searches all cells and ignores case. If no row is left, the screen says so."""
    document = overview()
    assert [row["id"] for row in selected(document, VIEWS[1], 0, True, "LOST")] == ["sim-w2"]
    assert "no row contains 'zebra'" in lines_of(Picture(document), TopState(wanted="zebra"))[3]


def test_keys() -> None:
    """Keys choose a view, sort, reverse, filter, scroll, pause, help and quit."""
    state = TopState()
    assert pressed(state, "\t").view == 1
    assert pressed(pressed(state, "5"), "\t").view == 0
    assert pressed(state, "9") == state
    sorted_by = pressed(pressed(state, "s"), "r")
    assert sorted_by.sort == (1, False)
    assert sorted_by.sorts[1:] == state.sorts[1:]
    typed = state
    for key in ["/", "a", "q", "b", "\x7f", "\r"]:
        typed = pressed(typed, key)
    assert (typed.wanted, typed.typed, typed.is_over) == ("aq", None, False)
    assert pressed(typed, "\x1b").wanted == ""
    assert pressed(pressed(typed, "/"), "\x1b") == typed
    assert pressed(pressed(state, "\x1b[B"), "j").top == 2
    assert pressed(state, "k").top == 0
    assert pressed(pressed(state, "?"), "x") == state
    assert pressed(state, " ").is_paused
    assert pressed(state, "q").is_over
    assert pressed(pressed(state, "?"), "q").is_over


def test_escape_sequences_are_one_key() -> None:
    """Input is split into keys, and an escape sequence counts as one key."""
    assert split_keys("a\x1b[Bq\x1bOA\x1b[5~\x1b") == ["a", "\x1b[B", "q", "\x1bOA", "\x1b[5~", "\x1b"]


@given(text=st.text(), state=st.just(TopState(wanted="x")))
def test_no_text_of_keys_fails(text: str, state: TopState) -> None:
    """After any typed input, `top` is in a state that can be shown."""
    for key in split_keys(text):
        state = pressed(state, key)
    assert state.page in VIEWS
    assert 0 <= state.sort[0] < len(state.page.columns)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
FIELDS = sorted({column.field for view in VIEWS for column in view.columns} | {"id", "progress", "age_s", "lag_ms"})
ROWS = st.lists(st.dictionaries(st.sampled_from(FIELDS), VALUES, max_size=8), max_size=4)
NAMES = st.sampled_from(["models", "workers", "calls", "tenants", "scaling", "gateways", "cluster", "at", "controller"])


@pytest.mark.slow
@given(document=st.dictionaries(NAMES, ROWS | VALUES, max_size=9), view=st.integers(0, 4), sort=st.integers(0, 4))
def test_any_document_can_be_shown(document: dict[str, Any], view: int, sort: int) -> None:
    """A document of another release or with wrong types is shown, without control characters."""
    state = TopState(view=view)
    state = pressed(state, "s") if sort else state
    shown = lines_of(Picture(document), state)
    assert len(shown) == 24
    assert not any(ord(char) < 32 or ord(char) == 127 for line in shown for char in line)
    assert plain_picture(document, 80)


def test_values_as_texts() -> None:
    """Missing values are shown as a dash, durations in a fitting unit, and texts without control characters."""
    assert [seconds(value) for value in (None, 0.0123, 2.5, 150, 7200)] == ["-", "12 ms", "2.5 s", "2 min", "2.0 h"]
    assert text_of("a\nb\x1b[2J") == "a b\\x1b[2J"
    assert items_of({"models": "no list"}, "models") == []
