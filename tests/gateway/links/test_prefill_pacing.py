"""Tests of prefill pacing, which limits the resumed prompts that a worker gets at once. A link counts the tokens of
resumed requests that the worker's engine has not begun to compute."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.api.output_parts import OutputPart
from cluster.api.types import EngineInfo, EngineRequest, Sampling, TokenOutput, WorkerIdentity
from cluster.gateway.links.liveness import LinkLiveness
from cluster.gateway.links.prefill_pacing import LEAST, STRETCH, UNKNOWN, PrefillPacing
from cluster.gateway.links.worker_link import LinkListener, SubmittedRequest, WorkerLink
from cluster.link.v1 import link_pb2 as pb
from tests.support.links import NoListener

STEP_TOKENS = 64
INFO = EngineInfo("sim", "sim", "1", 16, 1024, 32, STEP_TOKENS, 4096, 1000)


class Silent:
    """Sink that ignores all events."""

    last_token_at = 0.0

    def accepted(self) -> None:
        """Ignore the event. All other methods also ignore theirs."""

    def refused(self, reason: str, message: str, field: str) -> None: ...

    def token(self, token_id: int, now: float) -> None:
        """Store the time of the token. The link reads `last_token_at`."""
        self.last_token_at = now

    def parsed_token(self, token_id: int, parts: Sequence[OutputPart], now: float) -> None: ...

    def output(self, output: TokenOutput) -> None: ...

    def lost(self, why: str) -> None: ...

    def failed(self, error: BaseException) -> None: ...


class StepCounts(NoListener):
    """Listener that records, at the start of a step, how many tokens of resumed requests are not computed."""

    def __init__(self) -> None:
        self.resumed_tokens: list[int] = []

    def step_begun(self, link: WorkerLink, resumed: bool) -> None:
        """Record the number of tokens of resumed requests that are not yet computed."""
        self.resumed_tokens.append(link.pacing.resumed_tokens)


def linked(listener: LinkListener | None = None) -> WorkerLink:
    """Return a link to a worker with ample credit."""
    link = WorkerLink(WorkerIdentity("w", "i", "m"), INFO, 1, listener or NoListener(), LinkLiveness(0.0, 1.0, 1.0))
    link.apply(pb.WorkerTurn(seq=1, credit=pb.Credit(grant_id=1, sequences=1000, tokens=1_000_000)))
    return link


def submit(link: WorkerLink, prompt: int, emitted: int) -> int:
    """Submit a request with these numbers of prompt and emitted tokens, and return the request's slot."""
    request = EngineRequest("", [5] * prompt, Sampling(max_tokens=99), [6] * emitted)
    return link.submit(SubmittedRequest(request), Silent())


def turn(*accepted: int, step: bool = False) -> pb.WorkerTurn:
    """Return a worker's message that has no outputs. `accepted`: slots of the requests that the worker has accepted.
    `step`: whether the message reports an engine step."""
    message = pb.WorkerTurn(accepted=[pb.Accepted(slot=slot) for slot in accepted])
    if step:
        message.step.SetInParent()
    return message


def test_room_is_there_again_when_a_step_has_begun_with_them() -> None:
    """The tokens of a resumed request count as waiting only until a step that computes them has begun. If they counted
    until the request's first token, every other step would have no prefill."""
    listener = StepCounts()
    link, counts_at_begin = linked(listener), listener.resumed_tokens
    submit(link, 10, 0)
    assert (link.pacing.resumed_tokens, link.pacing.new_tokens) == (0, 10), "one that begins is counted apart"
    first, second = submit(link, 10, 5), submit(link, 20, 5)
    assert link.pacing.resumed_tokens == 40
    link.apply(turn(step=True))
    assert (link.pacing.resumed_tokens, counts_at_begin) == (40, []), "this step may have begun before they came"
    link.apply(turn(first))
    assert (link.pacing.resumed_tokens, counts_at_begin) == (40, []), "taken, but no step has begun since"
    link.apply(turn(step=True))
    assert (link.pacing.resumed_tokens, counts_at_begin) == (25, [25])
    link.apply(turn(second, step=True))
    assert (link.pacing.resumed_tokens, counts_at_begin) == (0, [25, 0])


def test_a_long_one_takes_as_many_steps_as_it_needs() -> None:
    """If a prompt does not fit into one step, its remaining tokens count as waiting until the next step begins."""
    link = linked()
    slot = submit(link, 2 * STEP_TOKENS, 8)
    link.apply(turn(slot, step=True))
    assert link.pacing.resumed_tokens == STEP_TOKENS + 8
    link.apply(turn(step=True))
    link.apply(turn(step=True))
    assert link.pacing.resumed_tokens == 0


@given(st.lists(st.tuples(st.sampled_from(["submit", "accept", "step", "abort", "refuse"]), st.integers(0, 200))))
def test_nothing_stays_behind(acts: list[tuple[str, int]]) -> None:
    """No request counts after its end, in whatever order requests arrive and end."""
    link = linked()
    waiting: list[int] = []
    slots: list[int] = []
    for act, number in acts:
        if act == "submit":
            slots.append(submit(link, 1 + number, number % 2))
            waiting.append(slots[-1])
        elif act == "accept" and waiting:
            link.apply(turn(waiting.pop(0)))
        elif act == "step":
            link.apply(turn(step=True))
        elif act == "abort" and slots:
            link.abort(slots[number % len(slots)])
        elif act == "refuse" and slots:
            link.apply(pb.WorkerTurn(refused=[pb.Refused(slot=slots[number % len(slots)], reason="NO_ROOM")]))
        assert min(link.pacing.resumed_tokens, link.pacing.new_tokens) >= 0
    for slot in slots:
        link.abort(slot)
    assert link.pacing.resumed_tokens == link.pacing.new_tokens == 0


@given(st.floats(0.001, 0.2), st.floats(1e-6, 1e-3), st.lists(st.integers(16, 2048), min_size=1, max_size=9))
def test_the_budget_makes_a_step_as_long_as_it_may_be(usual_s: float, per_token_s: float, prompts: list[int]) -> None:
    """The budget is learned from prompts with a fixed cost per token. A step that uses the full budget takes STRETCH
    times as long as the longest of twenty usual steps."""
    most = 2048
    replays = PrefillPacing(most)
    assert replays.budget() == int(UNKNOWN * most)
    for tokens in prompts:
        for _ in range(63):  # all steps but for a few take as long as usual, and so do the longest of twenty
            replays.record_step(usual_s, 0)
        replays.record_step(usual_s + tokens * per_token_s, tokens)
    budget = replays.budget()
    assert int(LEAST * most) <= budget <= most
    if int(LEAST * most) < budget < most:
        whole_s = usual_s + budget * per_token_s
        assert whole_s == pytest.approx(STRETCH * usual_s, rel=1e-6, abs=1.01 * per_token_s)


@given(st.floats(0.001, 0.05), st.floats(0.06, 0.2))
def test_the_budget_follows_the_longest_of_twenty_steps(usual_s: float, long_s: float) -> None:
    """The prefill budget follows the 95th percentile of the step lengths. So if one step in ten is long, the budget
    allows steps that are STRETCH times as long as these long steps."""
    replays = PrefillPacing(2048)
    tokens = 100
    for number in range(3000):
        replays.record_step(*((long_s, tokens) if number % 10 == 9 else (usual_s, 0)))
    wanted = (STRETCH * long_s - usual_s) / ((long_s - usual_s) / tokens)
    assert replays.budget() == pytest.approx(max(int(LEAST * 2048), wanted), rel=0.01)
