"""What is wanted against what is there: the steps, compared whole."""

from __future__ import annotations

import dataclasses

from hypothesis import given
from hypothesis import strategies as st

from cluster.control.reconcile import RETRY_S, SETTLE_S, Action, Delete, Deploy, Observed, Scale, Wanted, reconcile

NOW_S = 1_000.0


def seen(model: str, digest: str = "d", target: int = 1, **more: object) -> dict[str, Observed]:
    """An application that was deployed just now."""
    plain = Observed(model, digest, target, deployed_at_s=NOW_S)
    return {model: dataclasses.replace(plain, **more)}  # type: ignore[arg-type]


def test_new_changed_and_unwanted() -> None:
    """What is to go goes first; what is unchanged is not named."""
    wanted = [Wanted("same", "d", 1), Wanted("changed", "e", 1), Wanted("new", "d", 1)]
    there = {**seen("same"), **seen("changed"), **seen("old")}
    assert reconcile(wanted, there, NOW_S) == (Delete("old"), Deploy("changed", "changed"), Deploy("new", "new"))


def test_count_alone_scales() -> None:
    """Another number of replicas touches none that runs."""
    assert reconcile([Wanted("m", "d", 3)], seen("m"), NOW_S) == (Scale("m", 3),)


def test_what_is_being_deleted_is_waited_for() -> None:
    """Neither deleted twice nor deployed into its own end."""
    there = seen("m", deleting=True)
    assert reconcile([Wanted("m", "e", 1)], there, NOW_S) == ()
    assert reconcile([], there, NOW_S) == ()


def test_what_has_just_been_taken_is_not_deployed_twice() -> None:
    """Ray shows nothing of an application at first; only when that lasts is it made anew."""
    there = seen("m", digest="", target=0)
    assert reconcile([Wanted("m", "d", 1)], there, NOW_S + SETTLE_S - 1) == ()
    assert reconcile([Wanted("m", "d", 1)], there, NOW_S + SETTLE_S) == (Deploy("m", "changed"),)


def test_bad_luck_is_retried_and_a_refusal_is_not() -> None:
    """After a pause what Ray gave up on is tried again, unless the entry itself is at fault."""
    wanted = [Wanted("m", "d", 1)]
    assert reconcile(wanted, seen("m", gave_up=True), NOW_S + RETRY_S - 1) == ()
    assert reconcile(wanted, seen("m", gave_up=True), NOW_S + RETRY_S) == (Deploy("m", "retry"),)
    assert reconcile(wanted, seen("m", gave_up=True, running=1), NOW_S + RETRY_S) == ()
    assert reconcile(wanted, seen("m", gave_up=True, refused=True), NOW_S + 100 * RETRY_S) == ()
    assert reconcile([Wanted("m", "e", 1)], seen("m", refused=True), NOW_S) == (Deploy("m", "changed"),)


MODELS = st.dictionaries(st.sampled_from("abcd"), st.tuples(st.sampled_from("xy"), st.integers(1, 3)))


def carried_out(there: dict[str, Observed], actions: tuple[Action, ...], wanted: list[Wanted]) -> dict[str, Observed]:
    """The world after the steps, were Ray immediate."""
    after = dict(there)
    digests = {w.model: w for w in wanted}
    for action in actions:
        match action:
            case Delete(model):
                del after[model]
            case Scale(model, replicas):
                after[model] = dataclasses.replace(after[model], target=replicas)
            case Deploy(model):
                after[model] = Observed(model, digests[model].digest, digests[model].replicas, deployed_at_s=NOW_S)
    return after


@given(MODELS, MODELS)
def test_steps_lead_to_rest(have: dict[str, tuple[str, int]], want: dict[str, tuple[str, int]]) -> None:
    """Once its steps are done, a second look finds nothing to do and all as wanted."""
    wanted = [Wanted(model, *about) for model, about in want.items()]
    there = {model: Observed(model, *about, deployed_at_s=NOW_S) for model, about in have.items()}
    after = carried_out(there, reconcile(wanted, there, NOW_S), wanted)
    assert reconcile(wanted, after, NOW_S) == ()
    assert {model: (o.digest, o.target) for model, o in after.items()} == want
