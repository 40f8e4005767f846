"""Tests of the scheduling policy: each waiting sequence gets exactly one instruction (such as Send or Fail) that ends
its wait, capacity is never exceeded, and no capacity stays idle."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from cluster.api.types import CompatibilityKey
from cluster.policy.fairness.order import WaitingSequence
from cluster.policy.routing.router import Candidate
from cluster.policy.routing.version_split import Versions
from cluster.policy.scheduling.instructions import Acquit, End, Ending, Fail, ResumingSequence, Send
from cluster.policy.scheduling.worker_losses import SETTLE_S
from tests.policy.scheduling.policy_cases import KEYS, Fleet, carry_out, entry, policy_of, sent


def test_sequences_that_resume_go_first_and_only_to_compatible_workers() -> None:
    """A sequence that resumes is sent before all new sequences. It waits if only incompatible workers are free."""
    fleet = Fleet()
    fleet.add("w", free=1, key=KEYS[0])
    policy = policy_of(fleet)
    policy.admit(entry("new"), 0.0)
    policy.resume(ResumingSequence(entry("other"), 12, KEYS[1]), 0.0)
    policy.resume(ResumingSequence(entry("resumes"), 12, KEYS[0]), 0.0)
    assert sent(carry_out(policy, fleet, 0.0)) == [("resumes", "w")]
    fleet.grant("w", 2)
    assert sent(carry_out(policy, fleet, 0.0)) == [("new", "w")]
    assert policy.waiting("m") == (1, 12)


def test_a_sequence_with_tools_goes_where_they_are_parsed() -> None:
    """Sequences that need tools, new or resumed, go only to workers with a parser for tool calls, and are moved only to
    such workers. If no worker has a parser, they are sent to a worker that will refuse them, and no other sequence is
    delayed."""
    fleet = Fleet()
    fleet.add("plain", free=9)
    policy = policy_of(fleet)
    fleet.add("parses")
    fleet.workers["parses"] = replace(fleet.workers["parses"], parses_tools=True)
    with_tools = [replace(entry(key), needs_tools=True) for key in "abc"]
    policy.admit(with_tools[0], 0.0)
    assert sent(carry_out(policy, fleet, 0.0)) == [("a", "parses")]
    fleet.grant("parses", 1)
    policy.resume(ResumingSequence(with_tools[1], 12, KEYS[0]), 0.0)
    assert sent(carry_out(policy, fleet, 0.0)) == [("b", "parses")]
    running = ResumingSequence(with_tools[2], 12, KEYS[0])
    assert not list(policy.movable([running], "parses", 0.0))
    policy.admit(with_tools[2], 0.0)
    assert not carry_out(policy, fleet, 0.0)
    del fleet.workers["parses"]
    assert sent(carry_out(policy, fleet, 0.0)) == [("c", "plain")]


def test_a_suspect_waits_for_its_verdict() -> None:
    """A sequence that lost two workers in a row is suspect and waits for SETTLE_S seconds. Then its call is ended,
    unless several other workers were lost at about the same time. In that case the sequence is acquitted and sent."""
    fleet = Fleet()
    fleet.add("w", free=5)
    policy = policy_of(fleet)
    for link, at in (("l1", 0.0), ("l2", 1.0)):
        policy.losses.lost(link, at)
    suspect = ResumingSequence(entry("a"), 12, KEYS[0], suspect=True, lost_links=("l1", "l2"), lost_at=1.0)
    policy.resume(suspect, 1.0)
    assert carry_out(policy, fleet, 1.0 + 0.9 * SETTLE_S) == []
    assert carry_out(policy, fleet, 1.0 + SETTLE_S) == [End("a", Ending.BLAMED)]
    for link in ("l3", "l4", "l5"):
        policy.losses.lost(link, 2.0)
    policy.resume(suspect, 2.0)
    instructions = carry_out(policy, fleet, 1.0 + 2 * SETTLE_S)
    assert instructions[0] == Acquit("a")
    assert sent(instructions) == [("a", "w")]


@given(sharing=st.integers(2, 6), free=st.integers(1, 6), last=st.data())
def test_suspects_that_lost_workers_together_are_tried_one_by_one(sharing: int, free: int, last: st.DataObject) -> None:
    """A suspect is a sequence that may have crashed its workers. Suspects that lost the same workers are tried on
    separate workers: a worker with a suspect gets no other suspect until the first has a token. A suspect that then
    loses a third worker is ended."""
    fleet = Fleet()
    for name in ("w1", "w2"):
        fleet.add(name, free=free)
    policy = policy_of(fleet)
    for link, at in (("l1", 0.0), ("l2", 1.0)):
        policy.losses.lost(link, at)
    suspects = [
        ResumingSequence(entry(f"s{at}"), 12, KEYS[0], suspect=True, lost_links=("l1", "l2"), lost_at=1.0)
        for at in range(sharing)
    ]
    for one in suspects:
        policy.resume(one, 1.0)
    now, tried = 1.0 + SETTLE_S, list[str]()
    for _ in suspects:
        instructions = carry_out(policy, fleet, now)
        where = [worker for _, worker in sent(instructions)]
        assert len(where) == len(instructions) == len(set(where))
        assert not fleet.with_suspect & set(where)
        tried += [key for key, _ in sent(instructions)]
        fleet.with_suspect |= set(where)
        assert carry_out(policy, fleet, now) == []
        answered = last.draw(st.sampled_from(sorted(fleet.with_suspect)))
        fleet.with_suspect.remove(answered)  # its sequence has a token
        fleet.grant(answered, free)
        if len(tried) == sharing:
            break
    assert sorted(tried) == sorted(one.key for one in suspects)
    guilty = replace(suspects[0], lost_links=("l1", "l2", "l3"), lost_at=now)
    policy.losses.lost("l3", now)
    policy.resume(guilty, now)
    assert carry_out(policy, fleet, now + SETTLE_S) == [End(guilty.key, Ending.BLAMED)]


def test_what_can_never_resume_ends() -> None:
    """A sequence ends at once if all compatible workers have been replaced by incompatible ones."""
    fleet = Fleet()
    fleet.add("w", key=KEYS[1])
    fleet.replaced.add(KEYS[0])
    policy = policy_of(fleet)
    policy.resume(ResumingSequence(entry("a"), 12, KEYS[0]), 0.0)
    assert carry_out(policy, fleet, 0.0) == [End("a", Ending.REPLACED)]
    assert policy.waiting("m") == (0, 0)


def test_the_versions_of_a_queued_sequence_can_change() -> None:
    """The versions on which a queued sequence may begin can be changed until it is sent. Its preferred version is tried
    first, then the others."""
    fleet = Fleet()
    fleet.add("old", free=3, version="1")
    fleet.add("new", free=1, version="2")
    policy = policy_of(fleet)
    for key in ("a", "b", "c"):
        policy.admit(entry(key), 0.0, versions=Versions("2", frozenset(("1", "2"))))
    policy.set_versions("b", Versions("1", frozenset(("1",))))
    policy.set_versions("c", Versions("2", frozenset(("2",))))
    assert sent(carry_out(policy, fleet, 0.0)) == [("a", "new"), ("b", "old")]


def test_a_free_worker_gets_the_sequence_whose_prompt_it_holds() -> None:
    """When a worker becomes free, it gets the waiting sequence whose prompt it holds, ahead of the same tenant's older
    sequences. Blocks on a full worker do not count, and other tenants keep their turns."""
    fleet = Fleet()
    fleet.add("v", free=0)
    fleet.add("w", free=0)
    fleet.cached = {"b": {"w": 8}, "c": {"v": 9}, "z": {"w": 9}}
    policy = policy_of(fleet)
    for key in ("a", "b", "c"):
        policy.admit(replace(entry(key), tokens=40), 0.0)
    for key in ("y", "z"):
        policy.admit(replace(entry(key, "other"), tokens=40), 0.0)
    assert carry_out(policy, fleet, 0.0) == []
    fleet.grant("w", 2)
    assert sent(carry_out(policy, fleet, 0.0)) == [("b", "w"), ("z", "w")]
    fleet.grant("v", 2)
    assert sorted(sent(carry_out(policy, fleet, 1.0))) == [("c", "v"), ("y", "v")]


def test_a_sequence_with_another_adapter_keeps_its_place() -> None:
    """When a queued sequence's adapter gets another key, no sequence is sent earlier or later for it."""
    fleet = Fleet()
    fleet.add("w", free=0)
    policy = policy_of(fleet)
    for key in ("a", "b", "c"):
        policy.admit(entry(key, "flood", adapter="old"), 0.0)
    policy.admit(entry("d", "other"), 0.0)
    for key in ("b", "c"):
        assert policy.replace(entry(key, "flood", adapter="new"))
    assert not policy.replace(entry("gone", "flood", adapter="new"))
    fleet.workers["w"] = replace(
        fleet.workers["w"], free_sequences=4, free_tokens=100, adapters=frozenset(("old", "new"))
    )
    instructions = carry_out(policy, fleet, 1.0)
    assert [key for key, _ in sent(instructions)] == ["a", "b", "c", "d"]
    adapters = {one.entry.call_id: one.entry.adapter for one in instructions if isinstance(one, Send)}
    assert adapters == {"a": "old", "b": "new", "c": "new", "d": ""}


def test_a_sequence_that_cannot_be_routed_fails_alone() -> None:
    """If routing a sequence raises an exception, this sequence ends, and the next sequences are routed."""
    fleet = Fleet(broken=True)
    policy = policy_of(fleet)
    policy.admit(entry("a"), 0.0)
    policy.admit(entry("b"), 0.0)
    policy.resume(ResumingSequence(entry("c"), 12, KEYS[0]), 0.0)
    failed = [one.key for one in carry_out(policy, fleet, 0.0) if isinstance(one, Fail)]
    assert failed == ["c", "a", "b"]
    assert policy.waiting("m") == (0, 0)


@pytest.mark.parametrize("free", [0, 1, 2])
def test_no_more_is_moved_than_fits(free: int) -> None:
    """Only as many sequences are moved from a draining worker as the other workers have capacity for."""
    fleet = Fleet()
    fleet.add("leaves", free=9)
    fleet.add("stays", free=free)
    policy = policy_of(fleet)
    moved = []
    for move in policy.movable([ResumingSequence(entry(key), 12, KEYS[0]) for key in "abc"], "leaves", 0.0):
        moved.append(move)
        fleet.spend("stays")
    assert moved == [(key, "stays") for key in "abc"][:free]


def test_sequences_that_cannot_be_moved_are_not_looked_at_one_by_one() -> None:
    """If a sequence on a draining worker finds no room on the others, sequences with the same needs and as many tokens
    are passed over. A shorter one is still moved."""
    fleet = Fleet()
    fleet.add("leaves", free=9)
    fleet.add("stays", free=9)
    fleet.workers["stays"] = replace(fleet.workers["stays"], free_tokens=20)
    policy, looks = policy_of(fleet), 0
    route = fleet.candidates

    def counted(model: str, now: float, resumed: bool) -> Sequence[Candidate]:
        nonlocal looks
        looks += 1
        return route(model, now, resumed)

    fleet.candidates = counted  # type: ignore[method-assign]
    tokens = [30] * 50 + [12]
    running = [ResumingSequence(entry(str(at)), count, KEYS[0]) for at, count in enumerate(tokens)]
    assert list(policy.movable(running, "leaves", 0.0)) == [("50", "stays")]
    assert looks == 1


class PolicyMachine(RuleBasedStateMachine):
    """State machine in which sequences arrive, wait, resume and leave, while workers join, grant credit and leave."""

    def __init__(self) -> None:
        super().__init__()
        self.fleet = Fleet()
        self.policy = policy_of(self.fleet)
        self.now = 0.0
        self.serial = 0
        self.new: dict[str, WaitingSequence] = {}
        self.resuming: dict[str, ResumingSequence] = {}

    def _key(self) -> str:
        self.serial += 1
        return str(self.serial)

    @rule(
        tenant=st.sampled_from("ab"),
        deadline=st.none() | st.floats(0.5, 20),
        back=st.booleans(),
        adapter=st.sampled_from(["", "", "x", "y"]),
    )
    def enter(self, tenant: str, deadline: float | None, back: bool, adapter: str) -> None:
        """Queue a new sequence. With `back`, the sequence starts over after it lost its worker."""
        waiting = entry(self._key(), tenant, None if deadline is None else self.now + deadline, adapter=adapter)
        if back:
            self.policy.put_back(waiting, self.now)
        elif self.policy.admit(waiting, self.now).outcome is not None:
            return
        self.new[waiting.call_id] = waiting

    @rule(
        key=st.sampled_from(KEYS),
        home=st.sampled_from(["", "w0", "w1"]),
        rank=st.integers(0, 1),
        adapter=st.sampled_from(["", "", "x"]),
    )
    def resume(self, key: CompatibilityKey, home: str, rank: int, adapter: str) -> None:
        """Queue a sequence that must be resumed. `home`: the worker that holds its KV blocks. `rank`: its priority
        class."""
        sequence = ResumingSequence(entry(self._key(), rank=rank, adapter=adapter), 12, key, cached_on=home)
        self.policy.resume(sequence, self.now)
        self.resuming[sequence.key] = sequence

    @rule(
        name=st.sampled_from(["w0", "w1", "w2"]),
        free=st.integers(0, 3),
        key=st.sampled_from(KEYS),
        adapters=st.sampled_from(["", "x", "xy"]),
    )
    def worker(self, name: str, free: int, key: CompatibilityKey, adapters: str) -> None:
        """Add a worker, or change its credit and its adapters."""
        if name in self.fleet.workers:
            self.fleet.grant(name, free)
            worker = self.fleet.workers[name]
            self.fleet.workers[name] = replace(worker, adapters=frozenset(adapters))
        else:
            self.fleet.add(name, free, key, adapters=adapters)

    @rule(name=st.sampled_from(["w0", "w1", "w2"]))
    def worker_left(self, name: str) -> None:
        """Remove a worker."""
        self.fleet.workers.pop(name, None)

    @precondition(lambda self: self.new or self.resuming)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        """Cancel a waiting sequence."""
        key = data.draw(st.sampled_from(sorted([*self.new, *self.resuming])))
        assert self.policy.remove(key)
        assert not self.policy.remove(key)
        self._left(key)

    @rule(seconds=st.floats(0.0, 6.0))
    def expire(self, seconds: float) -> None:
        """End the sequences that have waited too long."""
        self.now += seconds
        for end in self.policy.expire(self.now, lambda model: 0.0):
            expected = Ending.TOO_LATE if end.key in self.new else Ending.NOT_RESUMED
            assert end.ending is expected
            self._left(end.key)

    def _left(self, key: str) -> None:
        assert (key in self.new) != (key in self.resuming), "only a waiting sequence may leave, and only once"
        self.new.pop(key, None)
        self.resuming.pop(key, None)

    @rule()
    def assign(self) -> None:
        """Carry out the policy's instructions to send sequences. Check that each chosen worker has the sequence's
        adapter.

        Then check that no sequence waits although a worker with free capacity has its adapter. So a sequence
        that waits for another adapter holds back no other sequence.
        """
        began = False
        for instruction in self.policy.assign("m", self.now):
            assert isinstance(instruction, Send)
            worker, key = self.fleet.workers[instruction.worker_id], instruction.entry.call_id
            assert worker.free_sequences > 0
            assert self._has(worker, instruction.entry)
            if key in self.resuming:
                assert not began, "sequences that resume are sent before all new sequences"
                assert worker.compatibility_key == self.resuming[key].compatibility
            else:
                began = True
            self._left(key)
            self.fleet.spend(worker.worker_id)
        free = [worker for worker in self.fleet.workers.values() if worker.free_sequences]
        for waiting in self.new.values():
            assert not any(self._has(worker, waiting) for worker in free), "capacity stays idle"
        for sequence in self.resuming.values():
            fits = [
                worker.incarnation
                for worker in free
                if worker.compatibility_key == sequence.compatibility and self._has(worker, sequence.entry)
            ]
            assert not fits or self.policy.resuming.waits_for(sequence.key, self.now) not in ("", *fits)

    @staticmethod
    def _has(worker: Candidate, waiting: WaitingSequence) -> bool:
        return not waiting.adapter or waiting.adapter in worker.adapters

    @invariant()
    def counts_agree(self) -> None:
        """The policy's counts equal the number of sequences that wait."""
        assert self.policy.waiting("m")[0] == len(self.new) + len(self.resuming)
        assert self.policy.room.statistics().requests + len(self.policy.worker_waits) == len(self.new)


PolicyMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestPolicy = PolicyMachine.TestCase


@given(
    st.dictionaries(st.integers(0, 199), st.integers(1, 2), max_size=6),
    st.integers(1, 12),
    st.sampled_from([20, 60, 200]),
    st.booleans(),
)
def test_a_sequence_finds_the_last_free_worker_of_many(
    free: dict[int, int], sequences: int, workers: int, one_is_bad: bool
) -> None:
    """Sequences resume as long as a compatible worker has a free slot. No worker gets more sequences than it has free
    slots.

    A sequence that has failed on a worker resumes there only if no other worker is free. A sequence is sent to the
    worker that holds its blocks.
    """
    fleet = Fleet()
    for number in range(workers):
        fleet.add(str(number), free.get(number, 0), KEYS[0] if number % 3 else KEYS[1])
    slots = {str(number): count for number, count in free.items() if number < workers and number % 3}
    policy = policy_of(fleet)
    bad = frozenset(list(slots)[:1]) if one_is_bad and len(slots) > 1 else frozenset[str]()
    holder = next((name for name in slots if name not in bad), "")
    for number in range(sequences):
        cached_on = holder if not number else ""
        policy.resume(ResumingSequence(entry(f"s{number}"), 12, KEYS[0], bad, cached_on), 0.0)
    pairs = sent(carry_out(policy, fleet, 0.0))
    assert Counter(name for _, name in pairs) <= Counter(slots)
    usable = sum(count for name, count in slots.items() if name not in bad)
    assert len(pairs) >= min(sequences, usable)
    assert not {name for _, name in pairs[:usable]} & bad
    if holder:
        assert pairs[0] == ("s0", holder)
    running = [ResumingSequence(entry("r"), 12, KEYS[0])]
    assert bool([*policy.movable(running, "elsewhere", 0.0)]) is any(fleet.workers[n].free_sequences for n in slots)
