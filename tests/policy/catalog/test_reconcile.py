"""Tests of the plans that turn the running Ray applications into the wanted ones. Some tests check a single plan,
others apply plans to a simulated Ray."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass, field

from hypothesis import given
from hypothesis import strategies as st

from cluster.policy.catalog.reconcile import (
    RETRY_S,
    SETTLE_S,
    SURGE_WAIT_S,
    Delete,
    Deploy,
    Observed,
    Plan,
    Scale,
    Wanted,
    app_name,
    app_parts,
    reconcile,
)

NOW_S = 1_000.0
DIGESTS = {"d": "d0", "e": "e0", "x": "aa", "y": "bb"}


def seen(model: str, digest: str = "d0", target: int = 1, **more: object) -> dict[str, Observed]:
    """Return an application that was just deployed, in a dict with its name as key."""
    one = dataclasses.replace(Observed(model, digest, target, deployed_at_s=NOW_S), **more)  # type: ignore[arg-type]
    return {one.app: one}


def settling(model: str, digest: str) -> dict[str, Observed]:
    """Return an application that Ray shows only by name so far, in a dict with its name as key."""
    name = app_name(model, "v1", digest)
    return {name: Observed(model, "", 0, deployed_at_s=NOW_S, named=name)}


def test_names_tell_what_runs() -> None:
    """The name of an application is parsed into model, version and digest. A name of another form counts as the model's
    name."""
    assert app_parts(app_name("m.x-1", "v2", "0af9")) == ("m.x-1", "v2", "0af9")
    assert app_parts("plain") == ("plain", "", "")


def test_new_and_unwanted() -> None:
    """Unwanted applications are deleted before new applications are deployed. An unchanged application gets no
    action."""
    wanted = [Wanted("same", "d0", 1), Wanted("new", "d0", 1)]
    there = {**seen("same"), **seen("old")}
    plan = reconcile(wanted, there, NOW_S, empty={"old@v1+d0"})
    assert plan == Plan((Delete("old@v1+d0"), Deploy("new@v1+d0", "new")), frozenset({"old@v1+d0"}))


def test_what_still_has_calls_is_not_deleted() -> None:
    """A retired application is deleted only once it has no calls."""
    assert reconcile([], seen("old"), NOW_S) == Plan((), frozenset({"old@v1+d0"}))


def test_count_alone_scales() -> None:
    """A change of the number of replicas leaves the remaining replicas running."""
    assert reconcile([Wanted("m", "d0", 3)], seen("m"), NOW_S).actions == (Scale("m@v1+d0", 3),)


def test_what_is_being_deleted_is_waited_for() -> None:
    """An application that Ray is deleting is neither deleted again nor deployed again."""
    there = seen("m", deleting=True)
    assert reconcile([Wanted("m", "d0", 1)], there, NOW_S) == Plan(())
    assert reconcile([], there, NOW_S, empty=there) == Plan(())


def test_what_has_just_been_taken_is_not_deployed_twice() -> None:
    """If Ray does not show an application that was just deployed, it is deployed again only after SETTLE_S."""
    there = settling("m", "d0")
    assert reconcile([Wanted("m", "d0", 1)], there, NOW_S + SETTLE_S - 1) == Plan(())
    assert reconcile([Wanted("m", "d0", 1)], there, NOW_S + SETTLE_S).actions == (Deploy("m@v1+d0", "unseen"),)


def test_bad_luck_is_retried_and_a_refusal_is_not() -> None:
    """A failed start is retried after a pause, unless Ray refused the entry."""
    wanted, again = [Wanted("m", "d0", 1)], (Deploy("m@v1+d0", "retry"),)
    assert reconcile(wanted, seen("m", gave_up=True), NOW_S + RETRY_S - 1).actions == ()
    assert reconcile(wanted, seen("m", gave_up=True), NOW_S + RETRY_S).actions == again
    assert reconcile(wanted, seen("m", gave_up=True, running=1), NOW_S + RETRY_S).actions == ()
    assert reconcile(wanted, seen("m", gave_up=True, refused=True), NOW_S + 100 * RETRY_S).actions == ()


def test_other_weights_start_again() -> None:
    """Replicas that run with other weights than the wanted ones are restarted once. They are not restarted again before
    SETTLE_S seconds have passed, because new replicas report their weights only after a while."""
    wanted = [Wanted("m", "d0", 1, stale=True)]
    assert reconcile(wanted, seen("m", running=1), NOW_S + SETTLE_S).actions == (Deploy("m@v1+d0", "other weights"),)
    assert reconcile(wanted, seen("m", running=1), NOW_S + SETTLE_S - 1).actions == ()


def test_changed_entry_comes_up_beside_the_old_one() -> None:
    """An old application stays until the new application has as many serving replicas. Then the old application gets no
    new calls, and is deleted when it has no calls left."""
    wanted, old, new = [Wanted("m", "e0", 2)], seen("m", target=2, running=2), "m@v1+e0"
    assert reconcile(wanted, old, NOW_S) == Plan((Deploy(new, "new"),))
    one_up = {**old, **seen("m", "e0", 2, running=1, placed=1)}
    assert reconcile(wanted, one_up, NOW_S) == Plan(())
    both_up = {**old, **seen("m", "e0", 2, running=2)}
    assert reconcile(wanted, both_up, NOW_S) == Plan((), frozenset({"m@v1+d0"}))
    emptied = reconcile(wanted, both_up, NOW_S, empty={"m@v1+d0"})
    assert emptied == Plan((Delete("m@v1+d0"),), frozenset({"m@v1+d0"}))


def test_where_both_do_not_fit_the_old_one_makes_room_one_by_one() -> None:
    """An old application gives up one replica at a time, and only while Ray cannot place the new application's
    replicas."""
    wanted, late = [Wanted("m", "e0", 2)], NOW_S + SURGE_WAIT_S
    new, old = seen("m", "e0", 2), seen("m", target=2, running=2)
    assert reconcile(wanted, {**old, **new}, late - 1).actions == ()
    assert reconcile(wanted, {**old, **new}, late).actions == (Scale("m@v1+d0", 1),)
    leaving = seen("m", target=1, running=1, leaving=1)
    assert reconcile(wanted, {**leaving, **new}, late).actions == ()
    starting = seen("m", "e0", 2, placed=1)
    assert reconcile(wanted, {**seen("m", target=1, running=1), **starting}, late).actions == ()
    green = seen("m", target=2, running=2, ray="green")
    assert reconcile(wanted, {**green, **new}, late).actions == (), "its GPUs are no use to the other Ray"


def test_what_cannot_come_up_displaces_nothing() -> None:
    """If the new application fails, the old application gets back the replicas that it gave up."""
    wanted = [Wanted("m", "e0", 3)]
    failed = seen("m", "e0", 3, gave_up=True, refused=True, trouble="no such model")
    there = {**seen("m", target=2, running=2), **failed}
    assert reconcile(wanted, there, NOW_S + SURGE_WAIT_S) == Plan((Scale("m@v1+d0", 3),))


def test_what_no_node_can_hold_displaces_nothing() -> None:
    """If the nodes have no room for the new application, the old one keeps the wanted number of replicas. If they have
    room for a part of it, the old one keeps what it has once that part runs."""
    wanted, late = [Wanted("m", "e0", 2, has_room=False)], NOW_S + 10 * SURGE_WAIT_S
    assert reconcile(wanted, {**seen("m", target=2, running=2), **seen("m", "e0", 2)}, late) == Plan(())
    gave_one = {**seen("m", target=1, running=1), **seen("m", "e0", 2)}
    assert reconcile(wanted, gave_one, late) == Plan((Scale("m@v1+d0", 2),))
    part_runs = {**seen("m", target=1, running=1), **seen("m", "e0", 2, running=1)}
    assert reconcile(wanted, part_runs, late) == Plan(())


def test_a_version_that_is_dropped_goes_at_once() -> None:
    """A rolled-back version is retired at once, without waiting for replicas of another version."""
    there = {**seen("m", target=2, running=1), **seen("m", "e0", version="v2", running=1)}
    assert reconcile([Wanted("m", "d0", 2)], there, NOW_S).retired == frozenset()
    assert reconcile([Wanted("m", "d0", 2)], there, NOW_S, dropped={("m", "v2")}).retired == {"m@v2+e0"}
    promoted = reconcile([Wanted("m", "e0", 2, "v2")], there, NOW_S)
    assert promoted == Plan((Scale("m@v2+e0", 2),)), "the other stays until as many serve"


def test_each_type_of_gpu_is_replaced_by_its_own() -> None:
    """A new application replaces only the old application on the same GPU type.

    If the new application has no replicas, an old application that serves is not retired. If the new application lacks
    capacity, it does not take capacity of another GPU type.
    """
    wanted = [Wanted("m", "aa", 1, gpu="H100"), Wanted("m", "bb", 2, gpu="L4")]
    old = {**seen("m", "d0", 1, running=1, gpu="H100"), **seen("m", "e0", 2, running=2, gpu="L4")}
    fast, slow = seen("m", "aa", 1, running=1, gpu="H100"), seen("m", "bb", 2, placed=2, gpu="L4")
    assert reconcile(wanted, {**old, **fast, **slow}, NOW_S) == Plan((), frozenset({"m@v1+d0"}))
    both = {**old, **fast, **seen("m", "bb", 2, running=2, gpu="L4")}
    assert reconcile(wanted, both, NOW_S).retired == {"m@v1+d0", "m@v1+e0"}
    waits = {**old, **seen("m", "aa", 1, gpu="H100"), **slow}
    assert reconcile(wanted, waits, NOW_S + SURGE_WAIT_S).actions == (Scale("m@v1+d0", 0),)
    none = [Wanted("m", "aa", 0, gpu="H100"), Wanted("m", "bb", 2, gpu="L4")]
    there = {**seen("m", "e0", 2, running=2, gpu="L4"), **seen("m", "aa", 0, gpu="H100"), **slow}
    assert reconcile(none, there, NOW_S) == Plan(())
    untyped = {**seen("m", "e0", 2, running=2), **seen("m", "aa", 0, gpu="H100"), **slow}
    assert reconcile(none, untyped, NOW_S) == Plan(()), "all that takes its place is waited for"


def test_frozen_models_are_not_rolled_out() -> None:
    """No application of a frozen model is replaced or deleted. A frozen model without applications is still
    deployed."""
    there = seen("m", running=1)
    assert reconcile([Wanted("m", "e0", 1)], there, NOW_S, frozen={"m"}) == Plan(())
    assert reconcile([Wanted("m", "e0", 1)], {}, NOW_S, frozen={"m"}).actions == (Deploy("m@v1+e0", "new"),)


# ---- a small Ray


@dataclass
class World:
    """Simulated Ray with `gpus` GPUs, one for each replica.

    A replica begins to serve two steps after it gets a GPU. A replica whose digest is in `broken` never serves.
    """

    gpus: int
    broken: frozenset[str] = frozenset()
    apps: dict[str, Observed] = field(default_factory=dict)
    now_s: float = NOW_S
    restarts: int = 0

    def carry_out(self, plan: Plan, wanted: Iterable[Wanted]) -> None:
        """Apply a plan to the simulated Ray."""
        by_app = {one.app: one for one in wanted}
        for action in plan.actions:
            match action:
                case Delete(app):
                    assert app not in by_app
                    del self.apps[app]
                case Scale(app, replicas):
                    now = self.apps[app]
                    self.apps[app] = dataclasses.replace(
                        now,
                        target=replicas,
                        running=min(now.running, replicas),
                        placed=min(now.placed, max(replicas - now.running, 0)),
                    )
                case Deploy(app, why):
                    want = by_app[app]
                    self.restarts += why not in ("new", "retry")
                    self.apps[app] = Observed(
                        want.model,
                        want.digest,
                        want.replicas,
                        version=want.version,
                        deployed_at_s=self.now_s,
                        gpu=want.gpu,
                    )

    def step(self) -> None:
        """Advance the simulated Ray by ten seconds."""
        self.now_s += 10.0
        for app, one in self.apps.items():
            if one.digest in self.broken:
                self.apps[app] = dataclasses.replace(one, gave_up=True, refused=True, placed=0, trouble="broken")
                continue
            up = one.running + one.placed
            used = sum(o.running + o.placed for o in self.apps.values())
            more = max(min(one.target - up, self.gpus - used), 0)
            self.apps[app] = dataclasses.replace(one, running=up, placed=more)

    def running(self, model: str) -> int:
        """Number of serving replicas of a model."""
        return sum(one.running for one in self.apps.values() if one.model == model)


ENTRIES = st.dictionaries(st.sampled_from("abc"), st.tuples(st.sampled_from(["aa", "bb"]), st.integers(1, 3)))


@given(ENTRIES, ENTRIES, st.integers(0, 10), st.sampled_from([frozenset[str](), frozenset({"bb"})]))
def test_any_change_comes_to_rest(
    have: dict[str, tuple[str, int]], want: dict[str, tuple[str, int]], spare: int, broken: frozenset[str]
) -> None:
    """After any change of the catalog, the simulated Ray reaches the wanted state, with or without spare GPUs.

    Applications are scaled but never restarted, and unchanged applications keep all replicas. A changed model keeps
    serving. If the old and the new replicas fit together, at least the smaller of the two numbers of replicas serves.
    Otherwise one replica fewer may serve, or fewer still if another model takes the GPUs that become free. At the end
    all applications are as wanted, as far as possible.
    """
    room = max(sum(n for _, n in have.values()), sum(n for _, n in want.values())) + spare
    world = World(room, broken)
    before = [Wanted(model, *about) for model, about in have.items() if about[0] not in broken]
    for _ in range(6):
        world.carry_out(reconcile(before, world.apps, world.now_s, empty=world.apps), before)
        world.step()
    assert all(world.running(one.model) == one.replicas for one in before)
    wanted = [Wanted(model, *about) for model, about in want.items()]
    kept = [one for one in before if any(one.model == two.model for two in wanted)]
    fits = sum(one.replicas for one in before) + sum(one.replicas for one in wanted) <= room
    for _ in range(60):
        world.carry_out(reconcile(wanted, world.apps, world.now_s, empty=world.apps), wanted)
        for one in kept:
            same = one in wanted
            least = min(one.replicas, min(two.replicas for two in wanted if two.model == one.model))
            grows = any(two.model != one.model and two not in before for two in wanted)
            assert world.running(one.model) >= (least if same or fits else 0 if grows else min(least, one.replicas - 1))
        world.step()
    assert world.restarts == 0
    for one in wanted:
        if one.digest not in broken:
            assert world.apps[one.app].running == one.replicas
            assert [app for app, o in world.apps.items() if o.model == one.model] == [one.app]
        elif any(two.model == one.model for two in before):
            assert world.running(one.model) == one.replicas, "the one before goes on in its place"
    assert {o.model for o in world.apps.values()} == {one.model for one in wanted}


TYPES = st.dictionaries(st.sampled_from(["", "H100", "L4"]), st.integers(0, 3), min_size=1)


@given(TYPES, TYPES, st.booleans())
def test_any_change_of_types_serves_all_the_while(have: dict[str, int], want: dict[str, int], same: bool) -> None:
    """During a change of GPU types and numbers of replicas, the number of serving replicas never falls below a minimum.
    At the end, only the wanted applications exist.

    The cluster has enough GPUs for old and new replicas together. So if all digests change, the minimum is the smaller
    of the old and the new number of replicas. If the digests stay (`same`), the minimum is the number of replicas that
    old and new applications have in common.
    """
    world = World(100)
    before = [Wanted("m", f"aa{at:x}", count, gpu=gpu) for at, (gpu, count) in enumerate(sorted(have.items()))]
    for _ in range(6):
        world.carry_out(reconcile(before, world.apps, world.now_s, empty=world.apps), before)
        world.step()
    digests = {one.gpu: one.digest for one in before} if same else {}
    wanted = [
        Wanted("m", digests.get(gpu, f"bb{at:x}"), count, gpu=gpu)
        for at, (gpu, count) in enumerate(sorted(want.items()))
    ]
    kept = sum(min(one.replicas, want.get(one.gpu, 0)) for one in before)
    for _ in range(20):
        world.carry_out(reconcile(wanted, world.apps, world.now_s, empty=world.apps), wanted)
        least = kept if same else min(sum(have.values()), sum(want.values()))
        assert world.running("m") >= least
        world.step()
    assert {app: one.running for app, one in world.apps.items()} == {one.app: one.replicas for one in wanted}
