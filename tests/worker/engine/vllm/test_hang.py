"""Two checks of a faulty engine. The engine's reported load shows that its core is stopped, without false alarms during
long prefills. The golden check finds an engine that gives wrong answers."""

from __future__ import annotations

import asyncio
import shutil
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from cluster.api.ports import Engine, EngineCorrupt
from cluster.api.types import EngineInfo, EngineLoad, FinishReason, Grammar
from cluster.worker.engine.golden_check import CheckedEngine, GoldenAnswer
from cluster.worker.engine.vllm.engine import VllmEngine
from tests.support.loop_clock import LoopClock
from tests.worker.engine.conftest import tiny_spec
from tests.worker.engine.contract import Driver, Subject, request

pytestmark = pytest.mark.engine

HANG_LEAST_S = 0.5


def looks_hung(load: EngineLoad) -> bool:
    """Return whether a gateway would consider the engine hung if the engine reported this load."""
    return bool(load.running) and not load.busy and load.step_age_s > max(5 * load.step_p99_s, HANG_LEAST_S)


@contextmanager
def watched(engine: Engine) -> Iterator[list[EngineLoad]]:
    """Record the engine's load every few milliseconds in a separate thread; yield the list of loads."""
    seen: list[EngineLoad] = []
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.005):
            seen.append(engine.load())

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield seen
    finally:
        done.set()
        thread.join()


@pytest.mark.parametrize("queued", [0, 6])
async def test_a_stopped_core_shows_and_goes_on(fast_subject: Subject, fast_core: psutil.Process, queued: int) -> None:
    """An engine core that SIGSTOP has stopped looks hung but not dead, with and without queued prompts.

    After SIGCONT the tokens are right.
    """
    driver = Driver(fast_subject)
    (undisturbed,) = await driver.run(request(fast_subject.prompt(300), max_tokens=400))
    ids = [await driver.submit(request(fast_subject.prompt(300), max_tokens=400)) for _ in range(8)]
    await driver.until(lambda: all(len(driver.answers[i].token_ids) > 3 for i in ids))
    for number in range(queued):
        ids.append(await driver.submit(request(fast_subject.prompt(301 + number, tokens=200), max_tokens=3)))
    assert not looks_hung(fast_subject.engine.load())
    fast_core.send_signal(signal.SIGSTOP)
    try:
        reader = asyncio.create_task(_drain(driver))
        async with asyncio.timeout(60), LoopClock() as clock:
            load = await _hung(fast_subject.engine)
        noticed_s = clock.now_s
        assert load.running == 8
        await fast_subject.engine.check()
    finally:
        fast_core.send_signal(signal.SIGCONT)
    bound_s = max(5 * load.step_p99_s, HANG_LEAST_S)
    assert noticed_s < 2 * bound_s + (3.0 if queued else 0.3), noticed_s
    async with asyncio.timeout(60):
        await reader
    assert all(driver.answers[i].token_ids == undisturbed.token_ids for i in ids[:8])
    await driver.empty()


async def _hung(engine: Engine) -> EngineLoad:
    """Poll the engine's load until `looks_hung` is true for it. Returns this load."""
    while True:
        load = engine.load()
        if looks_hung(load):
            return load
        await asyncio.sleep(0.005)


async def _drain(driver: Driver) -> None:
    await driver.until(lambda: all(answer.finish is not None for answer in driver.answers.values()))


async def test_long_prefills_and_grammars_raise_no_alarm(fast_subject: Subject) -> None:
    """A busy engine does not look hung, even with long prompts, grammars and decoding at the same time."""
    driver = Driver(fast_subject)
    schema = '{"type": "object", "properties": {"a": {"type": "string", "maxLength": 40}}, "required": ["a"]}'
    with watched(fast_subject.engine) as seen:
        for number in range(4):
            prompts = [fast_subject.prompt(320 + 8 * number + i, tokens=900) for i in range(4)]
            await driver.run(*(request(prompt, max_tokens=20) for prompt in prompts))
            constrained = request(
                fast_subject.prompt(360 + number),
                max_tokens=20,
                grammar=Grammar("json_schema", schema.replace("40", str(40 + number))),
                ignore_eos=False,
            )
            await driver.run(constrained, request(fast_subject.prompt(370), max_tokens=60))
    assert len(seen) > 20
    assert any(load.busy == "prefill" and load.prefill_tokens > 128 for load in seen)
    assert any(load.busy == "grammar" for load in seen)
    assert not [load for load in seen if looks_hung(load)]


class Started:
    """An engine that has already started. Its `start` only returns the info."""

    def __init__(self, subject: Subject) -> None:
        self._info = subject.info
        engine = subject.engine
        self.submit, self.abort, self.step = engine.submit, engine.abort, engine.step
        self.load, self.check, self.close = engine.load, engine.check, engine.close

    async def start(self) -> EngineInfo:
        """Return the info of the engine that has already started."""
        return self._info


class Forgetful(CheckedEngine):
    """An engine with golden checks. A test can replace the reference answer by a wrong one, so that the next check
    fails."""

    def forget(self) -> None:
        """Replace the reference answer by a wrong one."""
        right = self._reference
        self._reference = GoldenAnswer(list(reversed(right.positions)))


@pytest.mark.parametrize("sick", [False, True])
async def test_after_an_error_the_golden_prompt_decides(fast_subject: Subject, sick: bool) -> None:
    """After an error, the engine must answer the golden (fixed) prompt again. If the answer is the same as at the
    start, the engine keeps serving. Otherwise the engine counts as sick."""
    examined = Forgetful(Started(fast_subject), node="n9")
    driver = Driver(Subject(examined, await examined.start(), fast_subject.token_lo, fast_subject.token_hi))
    if sick:
        examined.forget()
    broken = request(
        fast_subject.prompt(340),
        max_tokens=50,
        emitted_token_ids=fast_subject.prompt(341),
        grammar=Grammar("regex", "[0-9]{40}"),
        ignore_eos=False,
    )
    (answer,) = await driver.run(broken)
    assert answer.finish is FinishReason.ERROR
    if not sick:
        await driver.run(request(fast_subject.prompt(342), max_tokens=40))
        return
    beside = request(fast_subject.prompt(342), max_tokens=40)
    with pytest.raises(EngineCorrupt, match="on node n9 is sick"):
        await driver.run(beside)
    await fast_subject.engine.abort([beside.request_id])


@pytest.fixture
def nans_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make vLLM count NaN values in logits, as it does on GPUs."""
    monkeypatch.setenv("VLLM_COMPUTE_NANS_IN_LOGITS", "1")


@pytest.mark.usefixtures("nans_counted")
async def test_broken_weights_are_found_at_start(llama_folder: Path, tmp_path: Path) -> None:
    """A checkpoint with NaN in one weight fails at start, because its golden answer ends in an error."""
    from safetensors.torch import load_file, save_file

    folder = Path(shutil.copytree(llama_folder, tmp_path / "broken"))
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][3] = float("nan")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    engine = VllmEngine(tiny_spec(), folder)
    examined = CheckedEngine(engine, node="n2")
    try:
        with pytest.raises(EngineCorrupt, match=r"on node n2 is sick: .*NaN in the logits"):
            await examined.start()
    finally:
        await examined.close()
