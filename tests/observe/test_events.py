"""The table of log events and the code that logs them agree."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster.observe.events import EVENTS, NAME
from scripts.log_events import LIFETIME, logged_events

LOGGED = logged_events()


def test_every_event_is_in_the_table_and_every_entry_is_logged() -> None:
    """The names in the log calls and in the table of events are the same."""
    assert {event.name for event in LOGGED} - {None} == EVENTS.keys()


def test_names_are_literals_of_one_grammar() -> None:
    """Each log call names its event as a literal `area.what_happened`; one module passes on names that it is given."""
    unnamed = {event.place.partition(":")[0] for event in LOGGED if event.name is None}
    assert unnamed <= {LIFETIME}
    assert [name for name in EVENTS if not NAME.fullmatch(name)] == []


def test_lines_about_a_call_have_its_trace_id() -> None:
    """No log call passes a request id alone: lines about a call also have its trace id."""
    assert [event.place for event in LOGGED if event.concerns_call and "trace_id" not in event.fields] == []


def test_meanings_are_sentences() -> None:
    """Each meaning is one sentence that ends with a full stop."""
    assert [name for name, meaning in EVENTS.items() if not meaning[0].isupper() or not meaning.endswith(".")] == []


def test_the_search_finds_what_a_module_logs(tmp_path: Path) -> None:
    """The search finds names, levels and fields, marks a name that is no literal, and reports it with its place."""
    package = tmp_path / "cluster"
    package.mkdir()
    (package / "part.py").write_text(
        "log.info('a.began', **call.log_fields, size=1)\n"
        "log.exception('b.failed' if x else 'c.failed')\n"
        "log.error(name)\n"
    )
    found = [(event.name, event.level, event.fields) for event in logged_events(tmp_path)]
    assert found == [
        ("a.began", "info", ("request_id", "trace_id", "size")),
        ("b.failed", "error", ("exception",)),
        ("c.failed", "error", ("exception",)),
        (None, "error", ()),
    ]


@pytest.mark.parametrize("text", ["worker_up", "Worker.up", "worker.up.again", "worker.", "a b.c"])
def test_other_forms_are_no_names(text: str) -> None:
    """A name without an area, with capitals, spaces or a second dot is refused."""
    assert NAME.fullmatch(text) is None
