"""Tests of limits: whatever calls and clocks do, no time window exceeds its limit, and every reservation is settled."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from cluster.api.outcomes import Outcome
from cluster.policy.limits.limits import (
    Granted,
    Limit,
    Limiter,
    LimitRefusal,
    ReservationRequest,
    TokenWeights,
    gateway_share,
)
from cluster.policy.limits.windows import (
    STEP_BACK_S,
    WINDOW_S,
    MonotonicClock,
    SlidingSum,
    day_ends_in_s,
    month_ends_in_s,
    month_of,
)
from cluster.policy.tenants.policy import TenantLimits, TenantPolicy

NOON = 1_790_000_000.0


def tenant(on_budget: str = "finish", **limits: int) -> TenantPolicy:
    """Return a tenant policy with these limits."""
    return TenantPolicy.from_json({"name": "acme", "limits": limits, "on_budget": on_budget})


def reserve(
    limiter: Limiter, policy: TenantPolicy, call_id: str, now: float, prompt: int = 10, output: int = 10
) -> Granted | LimitRefusal:
    """Reserve `prompt` and `output` tokens for a call; return the grant or the refusal."""
    return limiter.reserve(policy, ReservationRequest(call_id, prompt, output), now, NOON + now)


def refused(got: Granted | LimitRefusal) -> LimitRefusal:
    """Return the refusal, or fail if the call was admitted."""
    assert isinstance(got, LimitRefusal)
    return got


@pytest.mark.parametrize(
    ("limits", "limit", "outcome", "retry_s"),
    [
        ({"requests_per_minute": 1}, Limit.REQUESTS, Outcome.RATE_LIMITED, 61.0),
        ({"tokens_per_minute": 25}, Limit.TOKENS, Outcome.RATE_LIMITED, 61.0),
        ({"concurrent_requests": 1}, Limit.CONCURRENT, Outcome.RATE_LIMITED, 1.0),
        ({"daily_tokens": 25}, Limit.DAILY, Outcome.BUDGET_EXHAUSTED, day_ends_in_s(NOON)),
        ({"monthly_tokens": 25}, Limit.MONTHLY, Outcome.BUDGET_EXHAUSTED, month_ends_in_s(NOON)),
    ],
)
def test_each_limit_refuses_by_its_name(limits: dict[str, int], limit: Limit, outcome: Outcome, retry_s: float) -> None:
    """A second call that exceeds a limit is refused. The refusal names the limit and has the time after which to
    retry."""
    limiter = Limiter()
    policy = tenant("finish", **limits)
    assert isinstance(reserve(limiter, policy, "a", 0.0), Granted)
    refusal = refused(reserve(limiter, policy, "b", 0.0))
    assert (refusal.limit_name, refusal.outcome) == (limit, outcome)
    assert refusal.retry_after_s == pytest.approx(retry_s)
    assert refusal.limit == next(iter(limits.values()))
    assert limit.replace("_", " ") in refusal.message
    assert not limiter.has_reservation("b")


def test_a_call_that_can_never_fit_is_told_so() -> None:
    """A call that is larger than the limit is refused without a retry time, because no retry can succeed."""
    refusal = refused(reserve(Limiter(), tenant(tokens_per_minute=5), "a", 0.0))
    assert refusal.retry_after_s is None
    assert "alone exceeds" in refusal.message


def test_retrying_after_the_pause_succeeds_and_before_it_does_not() -> None:
    """A retry after the returned time succeeds, and a retry before that time is refused."""
    policy = tenant(requests_per_minute=2)
    limiter = Limiter()
    reserve(limiter, policy, "a", 0.25)
    reserve(limiter, policy, "b", 5.5)
    wait = refused(reserve(limiter, policy, "c", 9.0)).retry_after_s
    assert wait is not None
    assert isinstance(reserve(limiter, policy, "d", 9.0 + wait - 0.01), LimitRefusal)
    assert isinstance(reserve(limiter, policy, "e", 9.0 + wait), Granted)


def test_standing_is_told_with_the_grant() -> None:
    """A granted reservation contains the values of the x-ratelimit headers."""
    got = reserve(Limiter(), tenant(requests_per_minute=5, tokens_per_minute=100), "a", 3.5)
    assert isinstance(got, Granted)
    assert got.requests is not None
    assert got.tokens is not None
    assert (got.requests.limit, got.requests.remaining, got.requests.reset_s) == (5, 4, 60.5)
    assert (got.tokens.limit, got.tokens.remaining) == (100, 80)


def test_settling_gives_back_what_was_taken_in_vain() -> None:
    """A failed call costs one request and no tokens. A call that is longer than predicted costs the tokens that it
    really had."""
    limiter, policy = Limiter(), tenant(tokens_per_minute=100, daily_tokens=1000)
    reserve(limiter, policy, "failed", 0.0, 40, 40)
    limiter.settle("failed", 0, 0, 1.0, NOON)
    reserve(limiter, policy, "long", 2.0, 10, 10)
    limiter.settle("long", 10, 70, 3.0, NOON)
    limiter.settle("long", 10, 70, 3.0, NOON)
    use = limiter.use("acme")
    assert (use.tokens.total, use.day.used, use.running, use.requests.total) == (80, 80, 0, 2)


def test_a_reservation_twice_is_the_callers_mistake() -> None:
    """A second reservation for the same call raises ValueError."""
    limiter, policy = Limiter(), tenant()
    reserve(limiter, policy, "a", 0.0)
    with pytest.raises(ValueError, match="already"):
        reserve(limiter, policy, "a", 0.0)


@pytest.mark.parametrize(("on_budget", "ends"), [("stop", True), ("finish", False)])
def test_an_empty_budget_ends_the_call_or_not_as_configured(on_budget: str, ends: bool) -> None:
    """The policy `stop` ends a call that uses up the token budget. The call exceeds the budget by at most
    `quantum_tokens` tokens. The policy `finish` lets the call run on.

    In both cases the next call is refused.
    """
    limiter, policy = Limiter(quantum_tokens=16), tenant(on_budget, daily_tokens=100)
    reserve(limiter, policy, "a", 0.0, 10, 10)
    tokens = 0
    while tokens < 400 and limiter.top_up(policy, "a", tokens, tokens * 0.01, NOON):
        tokens += 1
    assert (tokens < 400) is ends
    if ends:
        assert 10 + tokens <= 100 + 16
    limiter.settle("a", 10, tokens, 5.0, NOON)
    assert limiter.use("acme").day.used == 10 + tokens
    assert refused(reserve(limiter, policy, "b", 6.0)).outcome is Outcome.BUDGET_EXHAUSTED


def test_a_minutes_limit_ends_no_running_call_but_keeps_others_out() -> None:
    """A running call may exceed a limit per minute. Other calls are then refused until this call's tokens have left the
    window."""
    limiter, policy = Limiter(quantum_tokens=10), tenant("stop", tokens_per_minute=50)
    reserve(limiter, policy, "a", 0.0, 10, 10)
    for tokens in range(100):
        assert limiter.top_up(policy, "a", tokens, 1.0, NOON)
    assert isinstance(reserve(limiter, policy, "b", 2.0), LimitRefusal)
    limiter.settle("a", 10, 99, 3.0, NOON)
    assert isinstance(reserve(limiter, policy, "c", 64.0), Granted)


def test_budgets_begin_anew_and_do_not_come_back_with_the_clock() -> None:
    """A new day resets the daily budget. A clock that steps back by a day resets nothing."""
    limiter, policy = Limiter(), tenant(daily_tokens=25)
    assert isinstance(limiter.reserve(policy, ReservationRequest("a", 10, 10), 0.0, NOON), Granted)
    assert isinstance(limiter.reserve(policy, ReservationRequest("b", 10, 10), 1.0, NOON), LimitRefusal)
    assert isinstance(limiter.reserve(policy, ReservationRequest("c", 10, 10), 2.0, NOON + 86_400), Granted)
    assert isinstance(limiter.reserve(policy, ReservationRequest("d", 10, 10), 3.0, NOON), LimitRefusal)


def test_months_are_the_calendars() -> None:
    """A month ends at the boundary of the calendar month."""
    end = NOON + month_ends_in_s(NOON)
    assert month_of(end) == month_of(NOON) + 1
    assert month_of(end - 0.001) == month_of(NOON)


def test_a_share_is_never_nothing() -> None:
    """If eight gateways have no shared store, each of them applies an eighth of each limit, but at least 1."""
    part = gateway_share(TenantLimits(requests_per_minute=100, concurrent_requests=2), 8)
    assert (part.requests_per_minute, part.concurrent_requests, part.daily_tokens) == (12, 1, None)


def test_output_may_count_more() -> None:
    """Token weights apply to the limit of tokens per minute, but not to budgets. Invalid weights are refused."""
    limiter = Limiter(weights=TokenWeights(input=1, output=2.5))
    policy = tenant(tokens_per_minute=100)
    reserve(limiter, policy, "a", 0.0, 10, 3)
    assert (limiter.use("acme").tokens.total, limiter.use("acme").day.used) == (18, 13)
    with pytest.raises(ValueError, match="weights"):
        TokenWeights(input=0)
    with pytest.raises(ValueError, match="finite"):
        MonotonicClock().read(float("nan"))


def test_sweeping_forgets_the_idle_only() -> None:
    """A sweep forgets only tenants whose sums are all zero."""
    limiter = Limiter()
    reserve(limiter, tenant(), "a", 0.0)
    limiter.sweep(1000.0)
    assert limiter.use("acme").running == 1
    limiter.settle("a", 0, 0, 1001.0, NOON)
    limiter.sweep(1002.0)
    assert "0 tenants" in repr(limiter)


@given(st.lists(st.tuples(st.floats(-200, 200), st.integers(1, 5)), max_size=60), st.integers(1, 12))
@settings(max_examples=200, deadline=None)
def test_no_window_holds_more_than_the_limit(steps: list[tuple[float, int]], limit: int) -> None:
    """No window of 60 s of real time exceeds the limit, even if the clock steps back."""
    window, clock = SlidingSum(), MonotonicClock()
    now = elapsed = 0.0
    admitted: list[tuple[float, int]] = []
    for step, amount in steps:
        now += step
        elapsed += max(step, 0.0)
        steady = clock.read(now)
        window.advance(steady)
        if window.total + amount <= limit:
            window.add(amount, steady)
            admitted.append((elapsed, amount))
    for at, _ in admitted:
        assert sum(a for t, a in admitted if at - WINDOW_S < t <= at) <= limit


class LimitsMachine(RuleBasedStateMachine):
    """State machine in which calls are admitted, run, fail and end, while the clock may step back.

    The sums of the limiter are compared with a complete log.
    """

    def __init__(self) -> None:
        super().__init__()
        self.limiter = Limiter(quantum_tokens=8)
        self.policy = tenant("stop", requests_per_minute=6, tokens_per_minute=200, concurrent_requests=4)
        self.now = self.high = self.elapsed = 1000.0
        self.limiter.sweep(self.now)
        self.serial = 0
        self.running: dict[str, tuple[float, int, int]] = {}
        self.admitted: list[float] = []
        self.used: list[tuple[float, int]] = []

    @rule(prompt=st.integers(0, 60), output=st.integers(1, 30), n=st.integers(1, 4))
    def ask(self, prompt: int, output: int, n: int) -> None:
        """Reserve a call with `prompt` input tokens and `n` outputs of `output` tokens each. If the call is admitted,
        check from the test's own records that the last minute's requests and tokens and the running calls are within
        the limits."""
        self.serial += 1
        got = self.limiter.reserve(
            self.policy, ReservationRequest(str(self.serial), prompt, n * output), self.now, NOON
        )
        if isinstance(got, LimitRefusal):
            return
        self.admitted.append(self.high)
        self.running[str(self.serial)] = (self.high, prompt, 0)
        assert sum(1 for t in self.admitted if self.high - WINDOW_S < t) <= 6
        assert len(self.running) <= 4
        settled = sum(tokens for t, tokens in self.used if self.high - WINDOW_S < t)
        alive = sum(p + o for t, p, o in self.running.values() if self.high - WINDOW_S < t)
        assert settled + alive + n * output <= 200

    @rule(data=st.data(), more=st.integers(1, 20))
    def generate(self, data: st.DataObject, more: int) -> None:
        """Generate some tokens for a running call."""
        if self.running:
            call_id = data.draw(st.sampled_from(sorted(self.running)))
            at, prompt, output = self.running[call_id]
            assert self.limiter.top_up(self.policy, call_id, output + more, self.now, NOON)
            self.running[call_id] = (at, prompt, output + more)

    @rule(data=st.data(), failed=st.booleans())
    def end(self, data: st.DataObject, failed: bool) -> None:
        """End a running call. With `failed`, the call costs no tokens."""
        if self.running:
            call_id = data.draw(st.sampled_from(sorted(self.running)))
            at, prompt, output = self.running.pop(call_id)
            prompt, output = (0, 0) if failed else (prompt, output)
            self.limiter.settle(call_id, prompt, output, self.now, NOON)
            self.used.append((at, prompt + output))

    @rule(seconds=st.sampled_from([0.3, 5.0, 31.0, 70.0, -0.5, -20.0]))
    def pass_time(self, seconds: float) -> None:
        """Advance the clock, or set it back.

        `elapsed` is the limiter's time, which follows the clock. If `elapsed` falls more than STEP_BACK_S (a
        minute) below its highest value, it continues from that value.
        """
        self.now += seconds
        self.elapsed += seconds
        if self.high - self.elapsed > STEP_BACK_S:
            self.elapsed = self.high
        self.high = max(self.high, self.elapsed)
        self.limiter.sweep(self.now)

    @invariant()
    def counts_are_those_of_what_runs(self) -> None:
        """The limiter's number of running calls is right, and its numbers of requests and tokens are never negative."""
        use = self.limiter.use("acme")
        assert use.running == len(self.running)
        assert use.requests.total >= 0
        assert use.tokens.total >= 0

    def teardown(self) -> None:
        """Check that every sum is zero after all calls are settled and the window has passed."""
        for call_id, (_, prompt, output) in self.running.items():
            self.limiter.settle(call_id, prompt, output, self.now, NOON)
        self.limiter.sweep(self.now + 4 * WINDOW_S)
        use = self.limiter.use("acme")
        assert (use.running, use.requests.total, use.tokens.total) == (0, 0, 0)


LimitsMachine.TestCase.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)
TestLimits = LimitsMachine.TestCase


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 40)), max_size=30))
def test_tries_and_tokens_without_a_call_keep_to_the_limits(steps: list[tuple[bool, int]]) -> None:
    """Requests and tokens can be charged without a call. Such a charge keeps every window within its limit, and does
    not count as a running call.

    A refused charge is not counted.
    """
    limiter, policy = Limiter(), tenant("finish", requests_per_minute=10, tokens_per_minute=100, daily_tokens=200)
    for is_try, tokens in steps:
        before = limiter.use("acme")
        counts = before.requests.total, before.tokens.total, before.day.used
        got = limiter.charge(policy, int(is_try), tokens, 0.0, NOON)
        use = limiter.use("acme")
        added = (int(is_try), tokens, tokens) if got is None else (0, 0, 0)
        assert (use.requests.total, use.tokens.total, use.day.used) == tuple(map(sum, zip(counts, added, strict=True)))
        assert use.requests.total <= 10
        assert use.tokens.total <= 100
        assert use.running == 0
