"""The list of problems: since when each is present, and in which order they are listed."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from cluster.policy.problems import ANY_ALERT, KINDS, MAX_PROBLEMS, Finding, Hurts, Problem, ProblemList, ordered

findings = st.builds(Finding, st.sampled_from(sorted(KINDS)), st.sampled_from("abc"), st.text(max_size=3))


@given(st.lists(st.tuples(st.floats(0.1, 20), st.lists(findings, max_size=6)), max_size=12))
def test_a_problem_is_listed_while_it_lasts(searches: list[tuple[float, list[Finding]]]) -> None:
    """A problem is listed if all searches of at least its kind's `after_s` have found it, and its time is that of the
    first of them."""
    problems, now, history = ProblemList(), 1000.0, list[tuple[float, set[tuple[str, str]]]]()
    for pause_s, found in searches:
        now += pause_s
        history.append((now, {(one.kind, one.object) for one in found}))
        problems.update(found, now)
        expected = {}
        for key in history[-1][1]:
            since = now
            for at, keys in reversed(history):
                if key not in keys:
                    break
                since = at
            if now - since >= KINDS[key[0]].after_s:
                expected[key] = since
        assert {(one.kind, one.object): one.since_s for one in problems.current} == expected


@given(st.lists(st.builds(Problem.of, findings, st.floats(0, 100)), max_size=20))
def test_those_that_hurt_callers_come_first(problems: list[Problem]) -> None:
    """Each problem is listed once, with the earliest of its times. Those that hurt callers come first, then the
    oldest."""
    listed = ordered(problems)
    keys = [(one.kind, one.object) for one in listed]
    assert len(set(keys)) == len(keys) == len({(one.kind, one.object) for one in problems})
    for one in listed:
        same = [each.since_s for each in problems if (each.kind, each.object) == (one.kind, one.object)]
        assert one.since_s == min(same)
    urgency = [(KINDS[one.kind].hurts is Hurts.OPERATORS, one.since_s) for one in listed]
    assert urgency == sorted(urgency)


def test_numbers_and_texts_are_bounded() -> None:
    """A process that reports endless problems of endless texts, or of a kind that another release knows, fills no
    list."""
    flood = [Problem.of(Finding("model_failed", f"{at}" + "x" * 10_000, "y" * 10_000), 0.0) for at in range(1000)]
    listed = ordered([*flood, Problem("from_the_future", "a", "", 0.0)])
    assert len(listed) == MAX_PROBLEMS
    assert all(len(str(one.row)) < 1500 for one in listed)
    assert "from_the_future" not in {one.kind for one in listed}


def test_each_kind_says_what_helps() -> None:
    """Each kind of problem has a text that names what has it, a remedy and a runbook."""
    for name, kind in KINDS.items():
        row = Problem(name, "this", "why", 1.0).row
        assert "this" in row["summary"], name
        assert len(kind.remedy) > 20, name
        assert row["runbook"] == (kind.alert or ANY_ALERT)
