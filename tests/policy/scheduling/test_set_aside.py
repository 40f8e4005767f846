"""Tests of sequences that are set aside: each waits for the worker that holds its prompt. No other sequence waits for
them, and they do not wait long.
"""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from cluster.policy.fairness.order import HolderWait, WaitingSequence
from cluster.policy.routing.router import FullHolder, RouteCall
from cluster.policy.routing.version_split import Build, Versions
from cluster.policy.scheduling.instructions import Send
from cluster.policy.scheduling.scheduling_policy import SchedulingPolicy
from cluster.policy.scheduling.set_aside import MAX_PER_MODEL, MAX_WAIT_S, SetAside
from tests.policy.scheduling.policy_cases import Fleet, carry_out, policy_of, sent

TOKENS = 5_000


def entry(key: str, tenant: str = "t", model: str = "m") -> WaitingSequence:
    """Return the entry of a sequence with a long prompt."""
    return WaitingSequence(key, model, tenant, TOKENS, None, "standard", 0.0)


def holder_at(worker: str, limit: float, gain: float = 1e9, uncached: float = 0.0) -> FullHolder:
    """Return a full worker that holds a prompt. Each sequence set aside for this worker adds 1,000 tokens to its wait.
    `limit`: longest allowed wait. `gain`: how much less the sequence costs on this worker than on the chosen one.
    `uncached`: number of prompt tokens that this worker must compute."""
    return FullHolder(worker, gain, 1_000.0, 0.0, limit, uncached, 1.0)


class LargeFleet(Fleet):
    """Workers with 64 slots, and with enough free tokens for a long prompt in each free slot."""

    def grant(self, name: str, free: int) -> None:
        """Set how many more sequences a worker can take."""
        self.workers[name] = replace(self.workers[name], free_sequences=free, free_tokens=TOKENS * free, slots=64)


def two_workers(*held: str, free_holder: int = 0, free_other: int = 2) -> tuple[Fleet, SchedulingPolicy]:
    """Return a fleet of two workers, `holder` and `other`, and a policy. `holder` holds the prompts of the sequences
    `held`. `free_holder` and `free_other`: number of sequences that each worker can take."""
    fleet = LargeFleet()
    for name, free in (("holder", free_holder), ("other", free_other)):
        fleet.add(name)
        fleet.grant(name, free)
    fleet.cached = {key: {"holder": TOKENS - 100} for key in held}
    return fleet, policy_of(fleet, max_tokens=100 * TOKENS)


def test_it_waits_for_its_holder_and_nobody_waits_for_it() -> None:
    """While the worker that holds a sequence's prompt is full, the sequence waits outside the queue, and the next
    sequence is sent at once. When this worker has capacity again, the waiting sequence is sent to it first."""
    fleet, policy = two_workers("warm", "late")
    policy.admit(entry("warm"), 0.0)
    policy.admit(entry("cold", "u"), 0.0)
    assert sent(carry_out(policy, fleet, 0.0)) == [("cold", "other")]
    assert policy.waiting("m") == (1, TOKENS)
    policy.admit(entry("late", "u"), 0.1)
    fleet.grant("holder", 1)
    done = carry_out(policy, fleet, 0.1)
    assert sent(done) == [("warm", "holder")]
    assert [one.holder_wait for one in done if isinstance(one, Send)] == [HolderWait("holder", 0.1)]
    assert "late" in policy.aside
    fleet.grant("holder", 1)
    assert sent(carry_out(policy, fleet, 0.2)) == [("late", "holder")]
    assert policy.waiting("m") == (0, 0)


def test_it_goes_elsewhere_in_the_end() -> None:
    """A sequence that was set aside waits for the worker that holds its prompt, but at most MAX_WAIT_S. After that it
    goes to any worker. If all workers are full, it returns to the head of its queue."""
    fleet, policy = two_workers("warm")
    policy.admit(entry("warm"), 0.0)
    assert not carry_out(policy, fleet, 0.0)
    assert not carry_out(policy, fleet, MAX_WAIT_S - 0.1)
    fleet.grant("other", 0)
    assert not carry_out(policy, fleet, MAX_WAIT_S)
    assert "warm" not in policy.aside
    policy.admit(entry("new", "u"), MAX_WAIT_S)
    fleet.grant("other", 1)
    fleet.cached = {}
    assert sent(carry_out(policy, fleet, MAX_WAIT_S)) == [("warm", "other")]


def test_it_waits_once() -> None:
    """A sequence waits only once for the worker that holds its prompt. If it has waited in vain, it goes to the first
    worker with capacity."""
    fleet, policy = two_workers("warm", free_other=1)
    policy.admit(entry("warm"), 0.0)
    assert not carry_out(policy, fleet, 0.0)
    fleet.grant("other", 0)
    assert not carry_out(policy, fleet, MAX_WAIT_S)
    assert policy.position("warm") == 0
    fleet.grant("other", 1)
    done = carry_out(policy, fleet, MAX_WAIT_S + 1.0)
    assert sent(done) == [("warm", "other")]
    assert [one.holder_wait for one in done if isinstance(one, Send)] == [HolderWait("holder", MAX_WAIT_S)]


def test_it_keeps_its_version() -> None:
    """A sequence that may begin only on one version of the model still begins on this version after it was set aside
    and waited in vain."""
    fleet, policy = two_workers("warm")
    for name, version in (("holder", "v1"), ("other", "v1"), ("new", "v2")):
        if name == "new":
            fleet.add(name)
        fleet.workers[name] = replace(fleet.workers[name], build=Build(version))
    fleet.grant("new", 0)
    policy.admit(entry("warm"), 0.0, versions=Versions("v1", frozenset({"v1"})))
    assert not carry_out(policy, fleet, 0.0)
    assert "warm" in policy.aside
    fleet.grant("other", 0)
    assert not carry_out(policy, fleet, MAX_WAIT_S)
    fleet.grant("new", 2)
    assert not carry_out(policy, fleet, MAX_WAIT_S + 1.0)
    fleet.grant("other", 1)
    assert sent(carry_out(policy, fleet, MAX_WAIT_S + 2.0)) == [("warm", "other")]


def test_it_does_not_wait_for_the_dead() -> None:
    """A sequence that was set aside waits for one worker. It may go to another worker as soon as the first worker is
    gone, or when the sequence's wait reaches its time limit."""
    fleet, policy = two_workers("warm", "short")
    policy.admit(entry("warm"), 0.0)
    policy.admit(replace(entry("short"), deadline=2.0), 0.0)
    assert not carry_out(policy, fleet, 0.0)
    assert policy.position("warm") == policy.position("short") == 0
    assert not carry_out(policy, fleet, 1.9)
    assert sent(carry_out(policy, fleet, 2.0)) == [("short", "other")]
    del fleet.workers["holder"]
    fleet.cached = {}
    assert sent(carry_out(policy, fleet, 2.1)) == [("warm", "other")]


def test_it_does_not_wait_in_vain() -> None:
    """A sequence is set aside for the worker that holds its prompt, but not if another worker would give the first
    token earlier. The work ahead on the worker includes the sequences that are already set aside for it."""
    fleet, policy = two_workers("warm")
    fleet.workers["holder"] = replace(fleet.workers["holder"], prefill_tokens=150_000)
    policy.admit(entry("warm"), 0.0)
    assert sent(carry_out(policy, fleet, 0.0)) == [("warm", "other")]

    aside, call = SetAside(), RouteCall("m", TOKENS)
    holder = FullHolder("w", gain=1e9, per_sequence=0.0, wait=100.0, limit=1_000.0, uncached=400.0, slowdown=1.0)
    added = 0
    while aside.best(entry("x"), [holder]):
        aside.add(entry(str(added)), call, holder, 0.0)
        added += 1
    assert added == 3


def test_a_cancelled_sequence_leaves_nothing() -> None:
    """A sequence can be cancelled while it is set aside, that is, waits for the worker that holds its prompt. Then
    nothing of it remains in the policy, and its tenant is not charged."""
    fleet, policy = two_workers("warm")
    policy.admit(entry("warm"), 0.0)
    assert not carry_out(policy, fleet, 0.0)
    assert policy.remove("warm")
    assert not policy.remove("warm")
    assert policy.waiting("m") == (0, 0)
    policy.admit(entry("again"), 1.0)
    policy.admit(entry("first", "u"), 1.0)
    fleet.grant("other", 1)
    assert sent(carry_out(policy, fleet, 1.0)) == [("again", "other")]


@given(
    st.lists(
        st.tuples(st.sampled_from(["add", "pop"]), st.integers(0, 9), st.sampled_from("ab"), st.sampled_from("vw")),
        max_size=60,
    )
)
def test_sums_follow_the_sequences(steps: list[tuple[str, int, str, str]]) -> None:
    """SetAside keeps running totals of its sequences and of their work. After any additions and removals, these totals
    equal those computed anew from the sequences."""
    aside, known = SetAside(), dict[str, tuple[str, str]]()
    for step, number, model, worker in steps:
        key = str(number)
        if step == "pop":
            assert (aside.pop(key) is not None) == (key in known)
            known.pop(key, None)
        elif key not in known:
            holder = holder_at(worker, 1e9, 1e9, 100.0)
            aside.add(entry(key, model=model), RouteCall(model, TOKENS), holder, 0.0)
            known[key] = (model, worker)
    for model in "ab":
        keys = [key for key, place in known.items() if place[0] == model]
        assert [one.entry.call_id for one in aside.in_order(model)] == keys
        assert aside.waiting(model) == (len(keys), TOKENS * len(keys))
        for worker in "vw":
            ahead = 100.0 * sum(place == (model, worker) for place in known.values())
            assert aside.best(entry("x", model=model), [holder_at(worker, ahead + 1)])
            assert not aside.best(entry("x", model=model), [holder_at(worker, ahead)])
            count = sum(place == (model, worker) for place in known.values())
            assert aside.best(entry("x", model=model), [holder_at(worker, 1e9, 1_100.0 * count + 1)])
            assert not count or not aside.best(entry("x", model=model), [holder_at(worker, 1e9, 1_100.0 * count)])
    assert set(aside.models) == {model for model, _ in known.values()}


def test_their_number_is_bounded() -> None:
    """For each model, at most MAX_PER_MODEL sequences are set aside, that is, wait for the worker that holds their
    prompt."""
    aside, holder = SetAside(), holder_at("w", 1e9)
    for number in range(MAX_PER_MODEL):
        assert aside.best(entry("x"), [holder])
        aside.add(entry(str(number)), RouteCall("m", TOKENS), holder, 0.0)
    assert not aside.best(entry("x"), [holder])
    assert aside.best(entry("x", model="n"), [holder])
    assert aside.pop("0") is not None
    assert aside.best(entry("x"), [holder])


def test_instructions_name_the_prediction() -> None:
    """When a sequence that was set aside is sent, the `Send` instruction has the number of cached tokens that is
    predicted at that time."""
    fleet, policy = two_workers("warm")
    policy.admit(entry("warm"), 0.0)
    assert not carry_out(policy, fleet, 0.0)
    fleet.grant("holder", 1)
    (send,) = carry_out(policy, fleet, 0.5)
    assert isinstance(send, Send)
    assert (send.cached_tokens, send.reason) == (TOKENS - 100, "cached_prefix")
