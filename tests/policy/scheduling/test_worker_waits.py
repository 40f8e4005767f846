"""Tests of sequences that wait for certain workers, such as those of a version or with an adapter: they wait beside the
queue, in turns and within bounds, and hold back no other sequence."""

from __future__ import annotations

from dataclasses import replace

import pytest

from cluster.policy.routing.version_split import Build, Versions
from cluster.policy.scheduling.instructions import End, Ending
from cluster.policy.scheduling.worker_waits import MAX_PER_TENANT
from tests.policy.scheduling.policy_cases import MAX_WAIT_S, Fleet, carry_out, entry, policy_of, sent


@pytest.mark.parametrize("healthy", [True, False])
def test_a_sequence_whose_version_is_full_holds_back_nobody(healthy: bool) -> None:
    """While the workers of a version are full or paused, sequences that must run on it wait beside the queue. Once a
    worker has room, the tenants that wait for it take turns, whoever came first."""
    fleet = Fleet()
    fleet.add("old", free=2, version="1")
    fleet.add("new", free=0 if healthy else 1, version="2")
    fleet.workers["new"] = replace(fleet.workers["new"], healthy=healthy)
    policy, pinned = policy_of(fleet), Versions("2", frozenset(("2",)))
    for key in ("a1", "a2", "a3"):
        policy.admit(entry(key), 0.0, versions=pinned)
    policy.admit(entry("b", "other"), 0.0, versions=pinned)
    policy.admit(entry("c", "third"), 0.0)
    policy.admit(entry("a4"), 0.0)
    assert sorted(sent(carry_out(policy, fleet, 0.0))) == [("a4", "old"), ("c", "old")]
    assert policy.waiting("m") == (4, 40)
    order = []
    for _ in range(4):
        fleet.workers["new"] = replace(fleet.workers["new"], healthy=True, free_sequences=1, free_tokens=100)
        order += sent(carry_out(policy, fleet, 1.0))
    assert order == [("a1", "new"), ("b", "new"), ("a2", "new"), ("a3", "new")]


def test_beyond_the_bound_a_tenant_holds_back_only_itself() -> None:
    """A tenant with many sequences that must run on a full version keeps those beyond the bound in its queue. None is
    ended, and other tenants go on."""
    fleet = Fleet()
    fleet.add("old", free=1, version="1")
    fleet.add("new", free=0, version="2")
    policy = policy_of(fleet, max_tokens=10**6)
    for number in range(MAX_PER_TENANT + 5):
        for key, has_begun in ((f"a{number}", False), (f"b{number}", True)):
            policy.admit(entry(key, key[0]), 0.0, versions=Versions("2", frozenset(("2",)), has_begun))
            assert carry_out(policy, fleet, 0.0) == []
    for key in ("c", "d"):
        policy.admit(entry(key, key), 1.0)
        fleet.grant("old", 1)
        assert sent(carry_out(policy, fleet, 1.0)) == [(key, "old")]
    assert policy.waiting("m") == (2 * (MAX_PER_TENANT + 5), 20 * (MAX_PER_TENANT + 5))
    assert policy.worker_waits.count("m") == 2 * MAX_PER_TENANT


def test_needs_take_turns() -> None:
    """Sequences with different needs that the same worker can serve take turns."""
    fleet = Fleet()
    fleet.add("old", free=1, version="1")
    fleet.add("new", free=0, version="2", adapters="x")
    policy, pinned = policy_of(fleet), Versions("2", frozenset(("2",)))
    for number in range(4):
        policy.admit(entry(f"a{number}", "flood"), 0.0, versions=pinned)
    policy.admit(entry("b", "other", adapter="x"), 0.0, versions=pinned)
    assert carry_out(policy, fleet, 0.0) == []
    order = []
    for _ in range(2):
        fleet.grant("new", 1)
        order += sent(carry_out(policy, fleet, 1.0))
    assert order == [("a0", "new"), ("b", "new")]


def test_a_head_that_fits_nowhere_holds_back_the_others() -> None:
    """If no worker has room for the first sequence, shorter sequences behind it do not overtake it."""
    fleet = Fleet()
    fleet.add("w", free=5)
    fleet.workers["w"] = replace(fleet.workers["w"], free_tokens=50)
    policy = policy_of(fleet)
    policy.admit(replace(entry("long"), tokens=60), 0.0, versions=Versions("2", frozenset(("2",))))
    policy.admit(entry("short", "other"), 0.0)
    assert carry_out(policy, fleet, 0.0) == []


@pytest.mark.parametrize("has_begun", [False, True])
@pytest.mark.parametrize("adapter", ["", "x"])
def test_a_sequence_whose_version_is_gone_holds_back_nobody(has_begun: bool, adapter: str) -> None:
    """While no worker takes calls of a version, sequences that must run on it wait, and the sequences behind them are
    sent. Once a worker of the version is there, they go first. A worker that is being replaced may finish a call that
    has begun on its version, and gets no other call."""
    fleet = Fleet()
    fleet.add("new", free=3, version="2")
    policy, versions = policy_of(fleet), Versions("1", frozenset("1"), has_begun)
    policy.admit(entry("a", adapter=adapter), 0.0, versions=versions)
    policy.admit(entry("b", "other"), 0.0)
    assert sent(carry_out(policy, fleet, 0.0)) == [("b", "new")]
    assert policy.waiting("m") == (1, 10)
    fleet.add("old", free=1, version="1")
    fleet.workers["old"] = replace(fleet.workers["old"], retired=True, adapters=frozenset({adapter} - {""}))
    assert sent(carry_out(policy, fleet, 1.0)) == ([("a", "old")] if has_begun else [])
    if not has_begun:
        fleet.workers["old"] = replace(fleet.workers["old"], retired=False)
        assert sent(carry_out(policy, fleet, 2.0)) == [("a", "old")]
    assert policy.waiting("m") == (0, 0)


def test_a_batch_that_has_begun_waits_for_its_version_as_a_whole() -> None:
    """However many sequences of a call have not begun when its version loses its workers, none of them is ended."""
    fleet = Fleet()
    fleet.add("new", free=1, version="2")
    policy = policy_of(fleet, max_tokens=10**6)
    ended, count = [], 2 * MAX_PER_TENANT
    for number in range(count):
        versions = Versions("1", frozenset("1"), has_begun=True)
        policy.put_back(entry(str(number)), 0.0, versions)
        ended += carry_out(policy, fleet, 0.0)
    assert (ended, policy.waiting("m")[0]) == ([], count)
    fleet.add("old", free=count, version="1")
    assert len(sent(carry_out(policy, fleet, 1.0))) == count


def test_a_prompt_goes_only_to_workers_with_its_tokenizer() -> None:
    """While replicas are replaced and the version keeps its name, a sequence gets a worker with the tokenizer that has
    encoded its prompt. If only workers that are being replaced have that tokenizer, one of them gets the sequence."""
    fleet = Fleet()
    for name, bundle, free in (("old", "b1", 1), ("new", "b2", 3)):
        fleet.add(name, free)
        fleet.workers[name] = replace(fleet.workers[name], build=Build("v1", bundle, name))
    policy = policy_of(fleet)
    for key, bundle in (("a", "b1"), ("b", "b1"), ("c", "b2")):
        policy.admit(entry(key), 0.0, versions=Versions(bundle_digest=bundle))
    assert sorted(sent(carry_out(policy, fleet, 0.0))) == [("a", "old"), ("c", "new")]
    fleet.grant("old", 1)
    fleet.workers["old"] = replace(fleet.workers["old"], retired=True)
    assert sent(carry_out(policy, fleet, 1.0)) == [("b", "old")]


def test_the_rest_of_a_call_gets_the_weights_on_which_it_began() -> None:
    """While replicas are replaced and the version keeps its name, further sequences of a call get only workers with the
    weights of the first."""
    fleet = Fleet()
    for name in ("old", "new"):
        fleet.add(name, 2)
        fleet.workers[name] = replace(fleet.workers[name], build=Build("v1", "b1", name))
    policy, begun = policy_of(fleet), Versions("v1", frozenset({"v1"}), True, "b1", "old")
    for key in "abc":
        policy.admit(entry(key), 0.0, versions=begun)
    policy.admit(entry("other"), 0.0, versions=Versions(bundle_digest="b1"))
    assert sent(carry_out(policy, fleet, 0.0)) == [("a", "old"), ("b", "old"), ("other", "new")]
    assert policy.waiting("m") == (1, 10)


def test_a_quarantined_version_finishes_no_call() -> None:
    """A call that has begun on a version that is now quarantined waits until the end of its wait, and then ends."""
    fleet = Fleet()
    fleet.add("old", free=1, version="1")
    fleet.add("new", free=1, version="2")
    fleet.workers["old"] = replace(fleet.workers["old"], retired=True, quarantined=True)
    policy = policy_of(fleet)
    policy.admit(entry("a"), 0.0, versions=Versions("1", frozenset("1"), has_begun=True))
    assert carry_out(policy, fleet, 0.0) == []
    assert policy.expire(MAX_WAIT_S, lambda model: 0.0) == [End("a", Ending.TOO_LATE)]


def test_a_sequence_that_waits_for_its_adapter_holds_back_nobody() -> None:
    """While no worker has loaded an adapter, the sequences that need it wait, and the sequences behind them are sent.
    Once a worker has loaded the adapter, the sequences that need it go first, in their order. A sequence whose adapter
    is still missing after MAX_WAIT_S ends."""
    fleet = Fleet()
    fleet.add("w", free=3)
    policy = policy_of(fleet)
    for key in ("a1", "a2"):
        policy.admit(entry(key, adapter="x"), 0.0)
    policy.admit(entry("late", adapter="y"), 0.0)
    policy.admit(entry("base"), 0.0)
    assert sent(carry_out(policy, fleet, 0.0)) == [("base", "w")]
    assert (policy.waiting("m"), policy.position("a2")) == ((3, 30), 0)
    policy.admit(entry("base2"), 1.0)
    fleet.workers["w"] = replace(fleet.workers["w"], adapters=frozenset("x"))
    assert sent(carry_out(policy, fleet, 1.0)) == [("a1", "w"), ("a2", "w")]
    assert policy.remove("base2")
    assert policy.expire(MAX_WAIT_S, lambda model: 0.0) == [End("late", Ending.TOO_LATE)]
    assert policy.waiting("m") == (0, 0)


def test_the_sequences_that_wait_for_adapters_are_bounded() -> None:
    """Only a limited number of a tenant's sequences may wait for adapters. Above this number, further sequences of the
    tenant end at once, but sequences of other tenants still wait."""
    fleet = Fleet()
    fleet.add("w", free=1)
    policy = policy_of(fleet, max_tokens=10**6)
    ended = []
    for number in range(MAX_PER_TENANT + 1):
        policy.admit(entry(str(number), adapter=str(number)), 0.0)
        ended += carry_out(policy, fleet, 0.0)
    policy.admit(entry("other", "another tenant", adapter="z"), 0.0)
    ended += carry_out(policy, fleet, 0.0)
    assert ended == [End(str(MAX_PER_TENANT), Ending.NO_ADAPTER)]
    assert policy.waiting("m")[0] == MAX_PER_TENANT + 1
