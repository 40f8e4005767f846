"""The simulated engine: the engine contract, its faults, its clocks and its source URL."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from cluster.api.adapters import ADAPTERS
from cluster.api.ports import EngineDead, EngineRefused
from cluster.api.types import EngineLoad, FinishReason, Grammar
from cluster.worker.engine.simulated.clock import Clock
from cluster.worker.engine.simulated.engine import SimConfig, SimEngine, SimFault, VirtualClock
from tests.worker.engine.contract import Driver, EngineContract, Subject, request

SMALL = SimConfig(vocab=1000, token_lo=100, token_hi=900, eos=2, max_model_len=256, max_num_seqs=4, kv_blocks=64)


async def subject(config: SimConfig = SMALL, clock: Clock | None = None) -> tuple[SimEngine, Driver]:
    """Return a started engine, by default in virtual time, and the driver of that engine."""
    engine = SimEngine(config, clock or VirtualClock())
    info = await engine.start()
    return engine, Driver(Subject(engine, info, 100, 900, deadline_s=5.0))


class TestContract(EngineContract):
    """The engine contract for the simulated engine."""

    @pytest.fixture
    async def engine(self) -> AsyncIterator[Subject]:
        """A small simulated engine in virtual time."""
        engine, driver = await subject()
        yield driver.subject
        assert engine.statistics().kv_used_blocks == 0
        await engine.close()


async def test_eos_comes_at_its_ratio_and_not_when_ignored() -> None:
    """With eos_ratio 0.1, about every tenth token is EOS. No token is EOS before min_tokens or with ignore_eos."""
    _, driver = await subject(SimConfig(vocab=1000, token_lo=100, token_hi=900, eos=2, eos_ratio=0.1))
    answers = await driver.run(
        *(request(driver.subject.prompt(i), 200, ignore_eos=False, min_tokens=3) for i in range(100))
    )
    lengths = [len(a.token_ids) for a in answers]
    assert all(a.finish is FinishReason.STOP and a.token_ids[-1] == 2 for a in answers)
    assert all(a.outputs[-1].stop_token_id is None for a in answers)
    assert min(lengths) > 3
    assert 9 < sum(lengths) / 100 < 17
    (ignoring,) = await driver.run(request(driver.subject.prompt(0), 200))
    assert len(ignoring.token_ids) == 200


CONTENT: list[dict[str, object]] = [
    {"cache_salt": "other"},
    {"adapter": "other"},
    {"temperature": 0.5},
    {"top_p": 0.9},
    {"top_k": 5},
    {"min_p": 0.1},
    {"seed": 7},
    {"frequency_penalty": 0.1},
    {"presence_penalty": 0.1},
    {"repetition_penalty": 1.1},
    {"logit_bias": {5: 1.0}},
    {"grammar": Grammar("regex", "a+")},
]


async def test_every_value_of_a_parameter_counts() -> None:
    """Different values of a parameter that takes effect after the first token give different tokens."""
    _, driver = await subject(SimConfig(vocab=1000, token_lo=100, token_hi=900))
    prompt = driver.subject.prompt(1)
    values: dict[str, tuple[object, object]] = {
        "seed": (7, 8),
        "frequency_penalty": (0.1, 0.2),
        "presence_penalty": (0.1, 0.2),
        "grammar": (Grammar("regex", "a+"), Grammar("regex", "b+")),
    }
    answers = await driver.run(*(request(prompt, 8, **{k: v}) for k, pair in values.items() for v in pair))
    assert len({answer.token_ids for answer in answers}) == len(answers)


async def test_an_end_may_come_right_after_min_tokens() -> None:
    """With eos_ratio 1, EOS is the first token after min_tokens."""
    _, driver = await subject(SimConfig(vocab=1000, token_lo=100, token_hi=900, eos=2, eos_ratio=1.0))
    answers = await driver.run(
        *(request(driver.subject.prompt(1), 9, ignore_eos=False, min_tokens=least) for least in range(5))
    )
    assert [len(answer.token_ids) for answer in answers] == [1, 2, 3, 4, 5]


async def test_an_abort_in_mid_step_gives_no_output() -> None:
    """A request that is aborted during a step has no output of that step. Another request has its output."""
    engine, driver = await subject()
    goes, stays = [await driver.submit(request(driver.subject.prompt(i), 3)) for i in range(2)]
    reader = asyncio.ensure_future(engine.step())
    await asyncio.sleep(0)
    await engine.abort([goes])
    assert [output.request_id for output in await reader] == [stays]


@pytest.mark.parametrize("change", CONTENT, ids=lambda change: next(iter(change)))
async def test_whatever_shapes_content_changes_every_token(change: dict[str, object]) -> None:
    """If a parameter that affects the generated text is changed, the tokens change from the first one on. At most one
    token is the same as before, by chance."""
    _, driver = await subject()
    prompt = driver.subject.prompt(1)
    plain, other = await driver.run(request(prompt, 8), request(prompt, 8, **change))
    assert sum(a == b for a, b in zip(plain.token_ids, other.token_ids, strict=True)) <= 1


async def test_limits_do_not_change_the_tokens() -> None:
    """A request with a higher max_tokens begins with the same tokens."""
    _, driver = await subject()
    prompt = driver.subject.prompt(1)
    short, long = await driver.run(request(prompt, 4), request(prompt, 9, min_tokens=9, stop_token_ids=(5,)))
    assert long.token_ids[:4] == short.token_ids


async def test_virtual_steps_take_their_stated_time() -> None:
    """Ten decodes of 20 ms and a prefill of 100 tokens at 1000 tokens/s take 0.3 s, after a load time of 5 s."""
    clock = VirtualClock()
    config = SimConfig(vocab=1000, token_lo=100, token_hi=900, prefill_tokens_per_s=1000.0, load_s=5.0)
    _, driver = await subject(config, clock)
    assert clock.now() == pytest.approx(5.0)
    await driver.run(request(driver.subject.prompt(1, tokens=100), 10))
    assert clock.now() == pytest.approx(5.0 + 0.3)


class LateClock(VirtualClock):
    """A clock that wakes callers 3 ms late, as a busy event loop does."""

    async def sleep_until(self, when: float) -> None:
        """Sleep until 3 ms after `when`."""
        if when > self.now():
            await super().sleep_until(when + 0.003)


class HeldClock:
    """A clock that shows the time that a test has set."""

    def __init__(self) -> None:
        self._now = 0.0
        self._moved = asyncio.Event()

    def now(self) -> float:
        """Return the time that was set last."""
        return self._now

    def be(self, now: float) -> None:
        """Set the time that the clock shows."""
        self._now = now
        self._moved.set()

    async def sleep_until(self, when: float) -> None:
        """Wait until the time is set to `when` or later."""
        while self._now < when:
            self._moved.clear()
            await self._moved.wait()


async def test_late_wake_ups_do_not_add_up() -> None:
    """Fifty steps of 20 ms end after 1 s plus one delay of a late clock; the delays do not add up."""
    clock = LateClock()
    _, driver = await subject(clock=clock)
    await driver.run(request(driver.subject.prompt(1, tokens=1), 50))
    assert clock.now() == pytest.approx(50 * 0.02 + 0.003)


async def test_a_step_begins_no_earlier_than_its_work() -> None:
    """A step after idle time takes its whole duration, counted from the submit of its request."""
    clock = VirtualClock()
    _, driver = await subject(clock=clock)
    await driver.run(request(driver.subject.prompt(1, tokens=1), 1))
    await clock.sleep_until(0.025)
    await driver.run(request(driver.subject.prompt(1, tokens=1), 1))
    assert clock.now() == pytest.approx(0.045)


async def test_the_wall_clock_is_the_default() -> None:
    """With the default clock, 10 steps of 4 ms take at least 40 ms of real time."""
    engine = SimEngine(SimConfig(vocab=1000, token_lo=100, token_hi=900, decode_ms=4.0))
    driver = Driver(Subject(engine, await engine.start(), 100, 900))
    before = time.monotonic()
    await driver.run(request(driver.subject.prompt(1), 10))
    assert time.monotonic() - before >= 0.04


async def test_a_cancelled_step_loses_no_output() -> None:
    """If a call of `step` is cancelled, no output is lost: the next call returns the step's tokens when they are
    due."""
    clock = VirtualClock()
    engine, driver = await subject(clock=clock)
    (expected,) = await driver.run(request(driver.subject.prompt(1, tokens=1), 3))
    request_id = await driver.submit(request(driver.subject.prompt(1, tokens=1), 3))
    await driver.step()
    reader = asyncio.ensure_future(engine.step())
    await asyncio.sleep(0)
    reader.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reader
    await driver.until(lambda: driver.answers[request_id].finish is not None)
    assert driver.answers[request_id].token_ids == expected.token_ids
    assert clock.now() == pytest.approx(6 * 0.02)


@pytest.mark.parametrize(("point", "at", "tokens"), [("prefill", 1, 0), ("step", 3, 2), ("last_token", 1, 4)])
async def test_die_at_a_point(point: str, at: int, tokens: int) -> None:
    """With the fault "die" armed, an engine dies at the chosen step. The tokens of the steps before it have been
    returned. Every call after the death raises EngineDead."""
    engine, driver = await subject()
    engine.faults.arm(point, "die", at)
    request_id = await driver.submit(request(driver.subject.prompt(1), 5))
    with pytest.raises(EngineDead):
        await driver.until(lambda: False)
    assert len(driver.answers[request_id].token_ids) == tokens
    with pytest.raises(EngineDead):
        await engine.check()
    with pytest.raises(EngineDead):
        await engine.submit(request(driver.subject.prompt(2)))


async def test_die_at_submit_wakes_the_reader() -> None:
    """A death at submit raises EngineDead both from `submit` and from a waiting `step`."""
    engine, driver = await subject()
    engine.faults.arm("submit", "die")
    reader = asyncio.ensure_future(engine.step())
    await asyncio.sleep(0)
    with pytest.raises(EngineDead):
        await engine.submit(request(driver.subject.prompt(1)))
    with pytest.raises(EngineDead):
        await asyncio.wait_for(reader, 60)


async def test_refuse_hits_one_request() -> None:
    """An injected refusal affects one request, and the next request is accepted."""
    engine, driver = await subject()
    engine.faults.arm("submit", "refuse")
    with pytest.raises(EngineRefused):
        await engine.submit(request(driver.subject.prompt(1)))
    await driver.run(request(driver.subject.prompt(1)))


async def test_hang_stands_still_until_healed() -> None:
    """During a hang no step ends and load() does not change. After `heal` the tokens are correct."""
    engine, driver = await subject()
    (expected,) = await driver.run(request(driver.subject.prompt(1), 6))
    engine.faults.arm("step", "hang", at=3)
    request_id = await driver.submit(request(driver.subject.prompt(1), 6))
    for _ in range(2):
        await driver.step()
    reader = asyncio.ensure_future(engine.step())
    for _ in range(10):
        await asyncio.sleep(0)
    stood = engine.load()
    other = await driver.submit(request(driver.subject.prompt(2), 2))
    assert not reader.done()
    assert (engine.load().steps, engine.load().running, engine.load().busy) == (stood.steps, 1, "")
    await engine.check()
    engine.faults.heal()
    for output in await asyncio.wait_for(reader, 60):
        driver.answers[output.request_id].outputs.append(output)
    await driver.until(lambda: all(driver.answers[i].finish is not None for i in (request_id, other)))
    assert driver.answers[request_id].token_ids == expected.token_ids


@pytest.mark.parametrize("point", ["step", "prefill"])
async def test_a_hang_ages_and_soon_states_no_work(point: str) -> None:
    """During a hang, the engine's load reports a step age far above the duration of earlier steps. At first it also
    reports "prefill" as the work that explains a long step. After two seconds it reports no such work."""
    clock = VirtualClock()
    engine, driver = await subject(clock=clock)
    await driver.run(request(driver.subject.prompt(1), 20))
    engine.faults.arm(point, "hang")
    await driver.submit(request(driver.subject.prompt(2, tokens=50), 3))
    reader = asyncio.ensure_future(engine.step())
    await asyncio.sleep(0)
    assert engine.load().busy == "prefill"
    await clock.sleep_until(clock.now() + 2.0)
    load = engine.load()
    assert (load.running, load.busy) == (1, "")
    assert load.step_age_s >= 2.0 > 50 * load.step_p99_s
    engine.faults.heal()
    await asyncio.wait_for(reader, 60)


@pytest.mark.parametrize(("point", "busy"), [("prefill", "prefill"), ("step", "")])
async def test_a_slow_prefill_states_its_work(point: str, busy: str) -> None:
    """While a prefill is slow, the engine's load names it as the work in progress. If a step is slow for no reason, the
    load names no work."""
    clock = HeldClock()
    engine, driver = await subject(clock=clock)
    engine.faults.arm(point, "slow", seconds=8.0)
    await driver.submit(request(driver.subject.prompt(1, tokens=50), 1))
    reader = asyncio.ensure_future(engine.step())
    await asyncio.sleep(0)
    clock.be(7.0)
    load = engine.load()
    assert (load.busy, load.prefill_tokens) == (busy, 50)
    assert load.step_age_s == 7.0
    clock.be(9.0)
    await reader
    assert engine.load().prefill_tokens == 0


async def test_a_blocked_loop_shows_to_other_threads() -> None:
    """While the event loop is blocked, load() in another thread has a growing step age and no work."""
    engine = SimEngine(dataclasses.replace(SMALL, decode_ms=2.0))
    driver = Driver(Subject(engine, await engine.start(), 100, 900))
    await driver.run(request(driver.subject.prompt(1), 30))
    engine.faults.arm("step", "block", at=3, seconds=0.6)
    seen: list[EngineLoad] = []
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.01):
            seen.append(engine.load())

    thread = threading.Thread(target=watch)
    thread.start()
    await driver.run(request(driver.subject.prompt(2), 6))
    done.set()
    thread.join()
    oldest = max(seen, key=lambda load: load.step_age_s)
    assert oldest.step_age_s > 0.5 > 5 * oldest.step_p99_s
    assert (oldest.running, oldest.busy) == (1, "")


async def test_a_sick_engine_gives_other_tokens_until_healed() -> None:
    """After the fault `wrong` all tokens are wrong and nothing else changes. After `heal` the tokens are correct."""
    engine, driver = await subject()
    (right,) = await driver.run(request(driver.subject.prompt(1), 6))
    engine.faults.arm("step", "wrong")
    (wrong,) = await driver.run(request(driver.subject.prompt(1), 6))
    assert wrong.finish is FinishReason.LENGTH
    assert wrong.token_ids[0] != right.token_ids[0]
    engine.faults.heal()
    (healed,) = await driver.run(request(driver.subject.prompt(1), 6))
    assert healed.token_ids == right.token_ids


def test_kill_ends_the_process() -> None:
    """The fault `kill` ends the process by SIGKILL within a step."""
    program = (
        "import asyncio\n"
        "from cluster.worker.engine.simulated.engine import SimConfig, SimEngine\n"
        "from tests.worker.engine.contract import request\n"
        "async def main():\n"
        "    engine = SimEngine(SimConfig.from_source('sim://?vocab=99&fault=kill@step:2'))\n"
        "    await engine.start()\n"
        "    await engine.submit(request((1, 2), 9))\n"
        "    while True:\n"
        "        print(len(await engine.step()), flush=True)\n"
        "asyncio.run(main())\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (-signal.SIGKILL, "1\n"), done.stderr


async def test_close_ends_a_hang() -> None:
    """A caller that waits in a hung step gets EngineDead when the engine is closed."""
    engine, driver = await subject()
    engine.faults.arm("step", "hang")
    await driver.submit(request(driver.subject.prompt(1)))
    reader = asyncio.ensure_future(engine.step())
    await asyncio.sleep(0)
    await engine.close()
    with pytest.raises(EngineDead, match="closed"):
        await asyncio.wait_for(reader, 60)


async def test_slow_step_takes_longer() -> None:
    """The fault `slow` makes one step longer by its seconds."""
    clock = VirtualClock()
    engine, driver = await subject(clock=clock)
    engine.faults.arm("step", "slow", at=2, seconds=1.5)
    await driver.run(request(driver.subject.prompt(1, tokens=1), 4))
    assert clock.now() == pytest.approx(4 * 0.02 + 1.5)


async def test_nan_ends_one_request_in_error() -> None:
    """A step computes two requests. The fault `nan` ends one of them in ERROR with a message. The other request gets
    its tokens."""
    engine, driver = await subject()
    engine.faults.arm("step", "nan", at=2)
    broken, whole = await driver.run(request(driver.subject.prompt(1), 5), request(driver.subject.prompt(2), 5))
    assert (broken.finish, broken.outputs[-1].message) == (FinishReason.ERROR, "NaN in the logits")
    assert len(whole.token_ids) == 5
    assert engine.statistics().kv_used_blocks == 0


async def test_load_says_what_runs_and_waits() -> None:
    """load() counts the running and the waiting requests."""
    engine, driver = await subject()
    ids = [await driver.submit(request(driver.subject.prompt(i), 3)) for i in range(6)]
    await driver.step()
    load = engine.load()
    assert (load.running, load.waiting, load.busy) == (4, 2, "")
    assert load.kv_usage == pytest.approx(4 / 64)
    reader = asyncio.ensure_future(engine.step())
    await driver.abort(ids[:4])
    await driver.submit(request(driver.subject.prompt(9), 1))
    assert engine.load().waiting == 3
    reader.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reader


def test_source_gives_every_parameter() -> None:
    """A source URL gives the parameters, the folder and the faults. Overrides take precedence."""
    config = SimConfig.from_source(
        "sim:///models/a%20b?decode_ms=5&kv_blocks=64&seed=3&fault=die@step:5&fault=slow@prefill:0:0.5",
        {"max_model_len": 512, "kv_blocks": 128},
    )
    assert (config.folder, config.decode_ms, config.kv_blocks, config.seed) == ("/models/a b", 5.0, 128, 3)
    assert config.max_model_len == 512
    assert config.faults == (SimFault("die", "step", 5), SimFault("slow", "prefill", 0, 0.5))


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("hf://x", "begins with sim://"),
        ("sim://models/x", "three slashes"),
        ("sim:///x?decode=5", "'decode' is no parameter"),
        ("sim:///x?max_num_seqs=2.5", "max_num_seqs='2.5' is not an integer"),
        ("sim:///x?decode_ms=nan", "decode_ms='nan' must be finite"),
        ("sim:///x?decode_ms=fast", "decode_ms='fast' is not a number"),
        ("sim:///x?kv_blocks=0", "kv_blocks must be 1 or more"),
        ("sim:///x?kv_blocks=2&max_model_len=64", "kv_blocks x block_size must hold"),
        ("sim:///x?max_num_seqs=64&max_num_batched_tokens=8", "max_num_batched_tokens must be at least"),
        ("sim:///x?eos_ratio=1.5", "eos_ratio must lie in"),
        ("sim:///x?prefill_tokens_per_s=0", "prefill_tokens_per_s must be above 0"),
        ("sim:///x?vocab=10&token_hi=11", "token_hi must not exceed"),
        ("sim:///x?token_lo=5&token_hi=5", "token_lo must be below"),
        ("sim:///x?fault=die", "expected ACTION@POINT"),
        ("sim:///x?fault=die@noon", "'noon' is not one of"),
        ("sim:///x?fault=refuse@step", "at step only"),
        ("sim:///x?fault=die@step:x", "AT must be an integer"),
        ("sim:///x?fault=slow@step", "SECONDS above 0 are required for slow and block"),
        ("sim:///x?fault=die@step:-1", "AT must be 0"),
    ],
)
def test_bad_source_names_the_parameter(source: str, says: str) -> None:
    """The error for an invalid source names the parameter."""
    with pytest.raises(ValueError, match=re.escape(says)):
        SimConfig.from_source(source)


async def test_folder_completes_the_source(tmp_path: Path) -> None:
    """Vocabulary, EOS, context length, sampling defaults and ordinary tokens come from the folder's files."""
    vocab = {"<s>": 0, "</s>": 1, "<0x00>": 2, "a": 3, "ab": 4, "b": 5, "abc": 6, "bcd": 7, "cde": 8, "<pad>": 9}
    (tmp_path / "config.json").write_text(json.dumps({"vocab_size": 12, "max_position_embeddings": 128}))
    (tmp_path / "generation_config.json").write_text(
        json.dumps({"eos_token_id": [1, 9], "temperature": 0.6, "top_p": 1.0, "top_k": None, "max_new_tokens": 64})
    )
    (tmp_path / "tokenizer.json").write_text(
        json.dumps({"model": {"vocab": vocab}, "added_tokens": [{"id": 0}, {"id": 1}, {"id": 9}]})
    )
    engine = SimEngine(SimConfig.from_source(f"sim://{tmp_path}"))
    info = await engine.start()
    assert (info.vocab_size, info.max_model_len) == (12, 128)
    assert info.default_sampling == {"temperature": 0.6, "max_tokens": 64}
    driver = Driver(Subject(engine, info, 3, 9))
    (answer,) = await driver.run(request((3, 4), 20))
    assert set(answer.token_ids) == {6, 7, 8}


async def test_folder_that_is_not_there_is_said(tmp_path: Path) -> None:
    """The engine does not start if the model folder, the vocabulary size or the EOS id is missing. The error gives the
    reason."""
    for config, says in (
        (SimConfig(folder=str(tmp_path / "none")), "no such folder"),
        (SimConfig(), "vocab is not given"),
        (SimConfig(vocab=10, eos_ratio=0.5), "which token EOS is"),
    ):
        with pytest.raises(ValueError, match=says):
            await SimEngine(config).start()


async def test_adapters_are_loaded_in_their_time_and_bounded() -> None:
    """A load of an adapter takes its configured time while requests run. Adapters above the capacity, and requests for
    adapters that are not loaded, are refused."""
    clock = VirtualClock()
    small = dataclasses.replace(SMALL, max_loras=1, max_cpu_loras=2, adapter_load_ms=500.0)
    engine, driver = await subject(small, clock)
    info = driver.subject.info
    assert (info.adapter_slots, info.adapter_capacity, ADAPTERS in info.capabilities) == (1, 2, True)
    prompt = driver.subject.prompt(3)
    with pytest.raises(EngineRefused) as refusal:
        await engine.submit(request(prompt, adapter="a"))
    assert (refusal.value.reason, refusal.value.field) == ("ADAPTER_INVALID", "adapter")
    before = clock.now()
    await engine.load_adapter("a", "/adapters/a", pinned=False)
    assert clock.now() - before >= 0.5
    await engine.load_adapter("b", "/adapters/b", pinned=False)
    with pytest.raises(EngineRefused, match="holds 2 adapters"):
        await engine.load_adapter("c", "/adapters/c", pinned=False)
    answers = await driver.run(*(request(prompt, adapter=name) for name in ("", "a", "b")))
    assert len({answer.token_ids for answer in answers}) == 3
    await engine.unload_adapter("a")
    await engine.unload_adapter("unknown")
    with pytest.raises(EngineRefused):
        await engine.submit(request(prompt, adapter="a"))


async def test_loads_of_adapters_can_fail() -> None:
    """A fault at the point `adapter` makes the load of an adapter fail. After the action `refuse` the engine keeps
    running. The action `die` ends the engine."""
    engine, driver = await subject(dataclasses.replace(SMALL, max_loras=1, max_cpu_loras=1))
    engine.faults.arm("adapter", "refuse")
    with pytest.raises(EngineRefused) as refusal:
        await engine.load_adapter("a", "/adapters/a", pinned=False)
    assert refusal.value.reason == "ADAPTER_INVALID"
    await engine.load_adapter("a", "/adapters/a", pinned=False)
    await driver.run(request(driver.subject.prompt(1), adapter="a"))
    engine.faults.arm("adapter", "die")
    with pytest.raises(EngineDead):
        await engine.load_adapter("a", "/adapters/a", pinned=False)


@pytest.mark.parametrize(
    ("overrides", "sizes"),
    [
        ({"enable_lora": True, "max_lora_rank": 64}, (1, 1)),
        ({"enable_lora": True, "max_loras": 8, "max_cpu_loras": 64, "max_lora_rank": 64}, (8, 64)),
        ({"max_loras": 2}, (2, 2)),
        ({"enable_lora": False}, (0, 0)),
        ({"enable_lora": False, "max_loras": 8, "max_cpu_loras": 64}, (0, 0)),
        ({}, (0, 0)),
    ],
)
def test_vllms_names_of_adapters_work_in_an_entry(overrides: dict[str, object], sizes: tuple[int, int]) -> None:
    """The keys for adapters in an entry's `engine` section are the same for a simulated engine as for vLLM."""
    config = SimConfig.from_source("sim:///nowhere", overrides)
    assert (config.max_loras, config.max_cpu_loras) == sizes
