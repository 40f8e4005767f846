"""The admission window follows the number of prompts that an engine can start: no slot is idle, and few sequences
queue.
"""

from __future__ import annotations

import dataclasses
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from cluster.api.types import EngineRequest, Sampling
from cluster.worker.admission_window import LOOKAHEAD_SEQUENCES, UNKNOWN_PROMPTS, AdmissionWindow
from cluster.worker.engine.simulated.config import SimConfig
from cluster.worker.engine.simulated.model import SimModel

pytestmark = pytest.mark.slow


def test_short_prompts_come_many_at_once_and_long_ones_do_not() -> None:
    """The window admits as many prompts as one step can start.

    Of prompts with 20 tokens, it admits more than a hundred. Of prompts that need two steps each, it admits three.
    """
    short, long = AdmissionWindow(256, 2048), AdmissionWindow(256, 2048)
    for number in range(200):
        for window, tokens in ((short, 20), (long, 4096)):
            window.record_submit(str(number), tokens)
            window.record_first_output(str(number))
            window.record_end(str(number))
            window.record_step()
    assert short.admissible_sequences > 100
    assert long.admissible_sequences == 1 + LOOKAHEAD_SEQUENCES


def test_calls_that_go_on_say_nothing_of_the_next_prompt() -> None:
    """A hundred resumed sequences with few tokens to compute do not let the window admit more long prompts."""
    ahead = AdmissionWindow(256, 2048)
    for number in range(200):
        ahead.record_submit(str(number), 1000 if number < 100 else 8, begins=number < 100)
        ahead.record_first_output(str(number))
        ahead.record_end(str(number))
        ahead.record_step()
    assert ahead.admissible_sequences == 3


def test_nothing_more_while_a_long_prompt_is_before_it() -> None:
    """While two prompts that need several steps each are pending, a third prompt waits in its gateway. It is admitted
    once one of the two has an output."""
    ahead = AdmissionWindow(8, 1000)
    ahead.record_submit("a", 5000)
    ahead.record_submit("b", 5000)
    assert ahead.admissible_sequences == 0
    ahead.record_first_output("a")
    ahead.record_step()
    assert ahead.admissible_sequences == 1


def test_an_idle_engine_has_room_for_three() -> None:
    """An idle engine with enough slots admits three sequences, so that several gateways have credit."""
    assert AdmissionWindow(32, 2048).admissible_sequences == 1 + LOOKAHEAD_SEQUENCES
    assert AdmissionWindow(2, 2048).admissible_sequences == 2


def test_more_than_places_only_where_calls_end_in_each_step() -> None:
    """If two sequences end in each step, the window admits two sequences more than the engine has slots. If none end,
    it admits as many as there are slots."""
    fast, slow = AdmissionWindow(4, 2048), AdmissionWindow(4, 2048)
    for number in range(400):
        for name in (f"{number}-a", f"{number}-b"):
            fast.record_submit(name, 10)
            fast.record_end(name)
        fast.record_step()
        slow.record_step()
    assert (fast.free_slots, slow.free_slots) == (4 + LOOKAHEAD_SEQUENCES, 4)


class LookaheadMachine(RuleBasedStateMachine):
    """A state machine that tests the admission window with submits, first outputs, ends and steps in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.ahead = AdmissionWindow(6, 500)
        self.live: list[str] = []
        self.pending: set[str] = set()
        self.count = 0

    @precondition(lambda self: self.ahead.admissible_sequences > 0)
    @rule(tokens=st.integers(1, 3000))
    def submit(self, tokens: int) -> None:
        self.count += 1
        self.live.append(str(self.count))
        self.pending.add(str(self.count))
        self.ahead.record_submit(str(self.count), tokens)

    @precondition(lambda self: self.pending)
    @rule()
    def begin(self) -> None:
        first = next(request_id for request_id in self.live if request_id in self.pending)
        self.pending.discard(first)
        self.ahead.record_first_output(first)

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        request_id = data.draw(st.sampled_from(self.live))
        self.live.remove(request_id)
        self.pending.discard(request_id)
        self.ahead.record_end(request_id)

    @rule()
    def step(self) -> None:
        self.ahead.record_step()

    @invariant()
    def bounded_by_places(self) -> None:
        assert len(self.live) + self.ahead.admissible_sequences <= 6 + LOOKAHEAD_SEQUENCES

    @invariant()
    def never_idle(self) -> None:
        """If a slot is free and no prompt is pending, a sequence is admitted."""
        if not self.pending and len(self.live) < 6:
            assert self.ahead.admissible_sequences > 0


TestLookahead = LookaheadMachine.TestCase


@pytest.mark.parametrize("median", [30, 300, 1500])
@given(st.integers(0, 1 << 30))
@settings(max_examples=5, deadline=None)
def test_the_engines_own_queue_stays_short(median: int, seed: int) -> None:
    """If a sender always uses the whole window, only a few sequences wait in the engine.

    Every slot is used, as far as the engine can compute the prompts in time.
    """
    chance = Random(seed)
    config = SimConfig.from_source("sim:///nowhere?max_num_seqs=32&kv_blocks=60000")
    model = SimModel(dataclasses.replace(config, vocab=1000, token_lo=1, token_hi=900, max_model_len=9000))
    ahead, most, full = AdmissionWindow(32, config.max_num_batched_tokens), 0, 0
    for step in range(300):
        for number in range(ahead.admissible_sequences):
            tokens = min(max(round(median * chance.lognormvariate(0, 0.7)), 1), 8000)
            sampling = Sampling(max_tokens=chance.randrange(20, 120), temperature=0.0, ignore_eos=True)
            request_id = f"{step}-{number}"
            model.submit(EngineRequest(request_id, [chance.randrange(900) for _ in range(tokens)], sampling))
            ahead.record_submit(request_id, tokens)
        plan = model.schedule()
        load = model.load()
        if step > UNKNOWN_PROMPTS:
            most = max(most, load.waiting)
            full += load.running >= 31 or plan.prefill_tokens >= config.max_num_batched_tokens // 2
        outputs = model.complete(plan)
        for output in outputs:
            if output.prompt_tokens is not None:
                ahead.record_first_output(output.request_id)
            if output.finish is not None:
                ahead.record_end(output.request_id)
        if outputs:
            ahead.record_step()
    assert most <= LOOKAHEAD_SEQUENCES + 1 + 512 // median
    assert full > 250
