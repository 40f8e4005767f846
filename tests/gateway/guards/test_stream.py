"""Tests of guards that filter a stream of text. However a text is split into chunks, the output is the same as for the
whole text."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.gateway.guards.stream import (
    Action,
    GuardChain,
    GuardMark,
    GuardStage,
    PatternStage,
    SizeStage,
    replacement,
)
from cluster.policy.tenants.patterns import Patterns
from tests.policy.tenants.test_patterns import accepted


def whole(sources: dict[str, str], action: Action, text: str) -> str:
    """Return the output of a pattern guard for a whole text, computed with Python's `re`."""
    pattern = re.compile("|".join(f"(?P<{n}>{s})" for n, s in sorted(sources.items())), re.ASCII)
    if action == "redact":
        return pattern.sub(lambda found: replacement(str(found.lastgroup)), text)
    first = pattern.search(text) if action == "refuse" else None
    return text if first is None else text[: first.start()]


def ignore(name: str, text: str) -> None:
    """Ignore a decision."""


def chain(stages: Sequence[GuardStage], **options: Any) -> GuardChain:
    """Return a chain of stages. By default all stages fail closed and the clock stands still."""
    options = {"on_failure": lambda number, error: False, "clock": lambda: 0.0, **options}
    return GuardChain(stages, [1.0] * len(stages), options["on_failure"], options["clock"])


GUARDS = st.lists(
    st.tuples(
        st.dictionaries(st.sampled_from("pqr"), accepted(), min_size=1),
        st.sampled_from(["redact", "redact", "refuse", "flag"]),
    )
    | st.tuples(st.integers(1, 40), st.sampled_from(["refuse", "flag"])),
    min_size=1,
    max_size=3,
)
CHUNKS = st.lists(st.text("ab1é x", max_size=6), max_size=16)


def stage_of(what: Any, action: Action) -> GuardStage:
    """Return a guard stage. If `what` is a number, it is the stage's size limit. Otherwise `what` has the patterns that
    the stage searches for."""
    return SizeStage(what, action, ignore) if isinstance(what, int) else PatternStage(Patterns(what), action, ignore)


def wanted_of(guards: Sequence[tuple[Any, Action]], text: str) -> str:
    """Return the expected output: the text after the guards were applied to the whole of it, one after the other."""
    for what, action in guards:
        if not isinstance(what, int):
            text = whole(what, action, text)
        elif action == "refuse":
            text = text[:what]
    return text


@given(GUARDS, CHUNKS)
def test_any_cut_gives_what_the_whole_text_gives(guards: list[tuple[Any, Action]], chunks: list[str]) -> None:
    """However a text is split, the output is the same as for the whole text. A stage never holds back more characters
    than its longest possible match."""
    stages = [stage_of(what, action) for what, action in guards]
    filters, out = chain(stages), ""
    bound = sum(Patterns(what).longest for what, _ in guards if not isinstance(what, int))
    wanted = wanted_of(guards, "".join(chunks))
    for chunk in chunks:
        out += filters.feed(chunk, ())[0]
        assert wanted.startswith(out)
        assert filters.done or filters.held <= bound
    out += filters.feed("", (), True)[0]
    assert out == wanted


@given(st.dictionaries(st.sampled_from("pqr"), accepted(), min_size=1), CHUNKS, CHUNKS)
def test_marks_tell_which_tokens_a_redaction_has_touched(
    sources: dict[str, str], chunks: list[str], more: list[str]
) -> None:
    """A token is marked as hidden if a redaction touched one of its characters. No other token is marked."""
    chunks = chunks + more
    text = "".join(chunks)
    spans = list(Patterns(sources).find(text))
    filters = chain([PatternStage(Patterns(sources), "redact", ignore), SizeStage(10**6, "refuse", ignore)])
    at, out, wanted = 0, "", []
    marks: list[GuardMark] = []
    for token, chunk in enumerate(chunks):
        mark = GuardMark(at, at + len(chunk), token)
        text_out, decided = filters.feed(chunk, [mark])
        at += len(chunk)
        out += text_out
        marks += decided
        assert all(mark.end <= len(out) for mark in decided)
        wanted.append(any(start < mark.end and mark.start < end for start, end in spans))
    text_out, decided = filters.feed("", (), True)
    out, marks = out + text_out, [*marks, *decided]
    assert [mark.token for mark in marks] == list(range(len(chunks)))
    assert [mark.hidden for mark in marks] == wanted
    for mark in marks:
        if not mark.hidden:
            assert out[mark.start : mark.end] == chunks[mark.token]


class Slow:
    """A guard stage that is slow at its second step: it advances the clock, and raises `error` if given."""

    refused = ""
    held = 0

    def __init__(self, error: Exception | None = None) -> None:
        self.now = 0.0
        self.steps = 0
        self._error = error
        self._kept = ""

    def feed(self, text: str, marks: Sequence[GuardMark], last: bool) -> tuple[str, Sequence[GuardMark]]:
        """Return the text except for the last character, which is held back."""
        self.steps += 1
        text, self._kept = self._kept + text, ""
        if self.steps == 2:
            self.now += 3.0
            if self._error is not None:
                self._kept = text
                raise self._error
        out, self._kept = (text, "") if last else (text[:-1], text[-1:])
        return out, marks

    def give_up(self) -> tuple[str, Sequence[GuardMark]]:
        """Return the text that is held back."""
        text, self._kept = self._kept, ""
        return text, ()


@pytest.mark.parametrize("error", [None, RuntimeError("broken")])
@pytest.mark.parametrize("fails_open", [True, False])
def test_a_guard_that_is_late_or_breaks(error: Exception | None, fails_open: bool) -> None:
    """A guard of a stream fails if it is late or raises an error. A failed guard that fails closed ends the text. A
    failed guard that fails open is skipped, without loss of text."""
    failures: list[tuple[int, Exception]] = []

    def on_failure(number: int, failure: Exception) -> bool:
        failures.append((number, failure))
        return fails_open

    slow = Slow(error)
    after = PatternStage(Patterns({"x": "cde"}), "redact", ignore)
    filters = chain([slow, after], on_failure=on_failure, clock=lambda: slow.now)
    out = "".join(filters.feed(part, ())[0] for part in ("ab", "cd", "ef")) + filters.feed("", (), True)[0]
    assert out == ("ab[redacted: x]f" if fails_open else "a")
    assert (filters.refused, len(failures), failures[0][0]) == (not fails_open, 1, 0)
    assert error is None or failures[0][1] is error
    assert slow.steps == 2


def test_decisions_are_told_once_with_their_text() -> None:
    """Each match is reported once with its text, however often its characters are scanned."""
    decisions: list[tuple[str, str]] = []
    stage = PatternStage(
        Patterns({"digits": r"\b\d{2,4}\b"}), "flag", lambda name, text: decisions.append((name, text))
    )
    out = "".join(stage.feed(part, (), False)[0] for part in "ab 123 45") + stage.feed("", (), True)[0]
    assert (out, decisions) == ("ab 123 45", [("digits", "123"), ("digits", "45")])
    sizes = SizeStage(2, "flag", lambda name, text: decisions.append((name, text)))
    assert [sizes.feed("ab", (), False)[0] for _ in range(3)] == ["ab"] * 3
    assert decisions[2:] == [("max_characters", "")]
