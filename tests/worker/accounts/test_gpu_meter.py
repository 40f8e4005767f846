"""GPU time is charged in proportion to the computed tokens, and no GPU time is lost."""

from __future__ import annotations

import dataclasses
import random
from collections import defaultdict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.api.types import EngineRequest, Sampling
from cluster.worker.accounts.gpu_meter import GpuMeter, GpuShare
from cluster.worker.engine.simulated.config import SimConfig
from cluster.worker.engine.simulated.model import SimModel

GPUS = 2.0


class Twin:
    """A simulated engine in virtual time, with a GPU meter that charges its steps.

    `true` has the exact charges for comparison.
    """

    def __init__(self, **parameters: float) -> None:
        source = "&".join(f"{name}={value}" for name, value in parameters.items())
        config = SimConfig.from_source(f"sim:///nowhere?{source}")
        room = config.kv_blocks * config.block_size
        config = dataclasses.replace(config, vocab=1000, token_lo=10, token_hi=900, max_model_len=room)
        self.model = SimModel(config)
        self.now = 0.0
        self.meter = GpuMeter(GPUS, config.max_num_batched_tokens, self.now)
        self.shares: dict[str, GpuShare] = {}
        self.got: dict[str, int] = defaultdict(int)
        self.charged: dict[str, float] = {}
        self.true: dict[str, float] = defaultdict(float)

    def submit(self, name: str, prompt: int, output: int) -> None:
        """Submit a request with a random prompt."""
        salt = random.Random(name)
        ids = [salt.randrange(10, 900) for _ in range(prompt)]
        self.model.submit(EngineRequest(name, ids, Sampling(max_tokens=output, ignore_eos=True, temperature=0.0)))
        self.shares[name] = self.meter.open_share(self.now)

    def step(self) -> None:
        """Run one step. The meter is called only for steps with outputs, as in a worker."""
        plan = self.model.schedule()
        computed = sum(tokens for _, tokens in plan.work)
        for sequence, tokens in plan.work:
            self.true[sequence.request.request_id] += plan.step_s * GPUS * tokens / computed
        outputs = self.model.complete(plan)
        self.now += plan.step_s
        if not outputs:
            return
        firsts = []
        for output in outputs:
            self.got[output.request_id] += len(output.token_ids)
            if output.prompt_tokens is not None:
                computed = output.prompt_tokens - (output.cached_tokens or 0)
                firsts.append((self.shares[output.request_id], computed, len(output.token_ids)))
        self.meter.step(self.now, sum(len(output.token_ids) for output in outputs), firsts)
        for output in outputs:
            if output.finish is not None:
                self.charged[output.request_id] = self.meter.charge(
                    self.shares[output.request_id], self.got[output.request_id]
                )
        if not self.model.has_work():
            self.meter.mark_idle()

    def run(self) -> None:
        """Run steps until all requests have ended."""
        while self.model.has_work():
            self.step()


def test_shares_are_those_of_the_tokens_computed() -> None:
    """Each request is charged its share of the tokens that each step computes. The requests differ in length and
    arrival."""
    twin = Twin(decode_ms=10, prefill_tokens_per_s=20_000, max_num_seqs=32, kv_blocks=50_000)
    chance = random.Random(5)
    for number in range(200):
        twin.submit(f"r{number}", chance.randrange(20, 400), chance.randrange(5, 80))
        for _ in range(chance.randrange(4)):
            twin.step()
    twin.run()
    for name, owed in twin.charged.items():
        assert owed == pytest.approx(twin.true[name], rel=0.02), name


def test_a_long_prompt_pays_for_all_its_steps() -> None:
    """If a prompt takes many steps, its request is charged a share of each of these steps. Other requests that run
    meanwhile are charged only their own share."""
    twin = Twin(decode_ms=10, prefill_tokens_per_s=20_000, max_num_batched_tokens=512, kv_blocks=50_000)
    for number in range(4):
        twin.submit(f"short{number}", 20, 400)
    for _ in range(50):
        twin.step()
    twin.submit("long", 8000, 10)
    twin.run()
    assert twin.charged["long"] == pytest.approx(twin.true["long"], rel=0.05)
    for number in range(4):
        assert twin.charged[f"short{number}"] == pytest.approx(twin.true[f"short{number}"], rel=0.05)


@given(
    st.lists(
        st.tuples(st.integers(1, 300), st.integers(1, 40), st.integers(0, 20), st.floats(0, 0.5)),
        min_size=1,
        max_size=30,
    ),
    st.integers(32, 256),
)
def test_all_shares_and_idle_are_lifetime_times_gpus(
    calls: list[tuple[int, int, int, float]], max_step_tokens: int
) -> None:
    """The sum of all charges and the idle time equals the engine's lifetime times the number of GPUs, within 1 %. This
    holds for any requests, preemptions and pauses."""
    twin = Twin(
        decode_ms=5, prefill_tokens_per_s=20_000, max_num_batched_tokens=max_step_tokens, max_num_seqs=4, kv_blocks=60
    )
    idle = 0.0
    for number, (prompt, output, steps, pause_s) in enumerate(calls):
        twin.submit(f"r{number}", prompt, output)
        for _ in range(steps):
            if twin.model.has_work():
                twin.step()
        if not twin.model.has_work():
            twin.now += pause_s
        live = [(twin.shares[n], twin.got[n]) for n in twin.shares if n not in twin.charged]
        idle += twin.meter.idle(twin.now, live)
    twin.run()
    twin.now += 0.5
    idle += twin.meter.idle(twin.now)
    assert sum(twin.charged.values()) + idle == pytest.approx(twin.now * GPUS, rel=0.01)


def test_idle_time_is_told_once() -> None:
    """An idle engine has idle time on all its GPUs, and each idle second is reported once."""
    meter = GpuMeter(4.0, 1000, now=10.0)
    assert meter.idle(11.0) == pytest.approx(4.0)
    assert meter.idle(11.0) == 0.0
    share = meter.open_share(12.0)
    meter.step(12.5, 1, [(share, 100, 1)])
    assert meter.charge(share, 1) == pytest.approx(0.5 * 4)
    meter.mark_idle()
    assert meter.idle(13.0) == pytest.approx(1.0 * 4 + 0.5 * 4)
