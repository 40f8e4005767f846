"""The table of log events matches the code that logs them."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster.observe.events import EVENTS, NAME
from scripts.log_events import LIFETIME, logged_events

LOGGED = logged_events()


def test_every_event_is_in_the_table_and_every_entry_is_logged() -> None:
    """Every event name in a log call is in the table of events, and every name in the table is logged."""
    assert {event.name for event in LOGGED} - {None} == EVENTS.keys()


def test_names_are_literals_of_one_grammar() -> None:
    """Each log call names its event with a literal. One module is excepted, which logs names that its callers pass. All
    names have the form `area.what_happened`."""
    unnamed = {event.place.partition(":")[0] for event in LOGGED if event.name is None}
    assert unnamed <= {LIFETIME}
    assert [name for name in EVENTS if not NAME.fullmatch(name)] == []


def test_lines_about_a_call_have_its_trace_id() -> None:
    """Every log event with the request id of a call also has the call's trace id."""
    assert [event.place for event in LOGGED if event.concerns_call and "trace_id" not in event.fields] == []


def test_meanings_are_sentences() -> None:
    """In the table of log events, the meaning of each event begins with a capital letter and ends with a full stop."""
    assert [name for name, meaning in EVENTS.items() if not meaning[0].isupper() or not meaning.endswith(".")] == []


def test_the_search_finds_what_a_module_logs(tmp_path: Path) -> None:
    """`logged_events` finds the names, levels and fields of logged events. The name is None if it is not a literal."""
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
    """A name of an event is refused if it has no area, or if it has capitals, spaces or a second dot."""
    assert NAME.fullmatch(text) is None
