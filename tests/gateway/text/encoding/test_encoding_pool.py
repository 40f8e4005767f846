"""Long prompts are tokenized in helper processes. The event loop stays free, the ids are the same, and a lost helper
fails no call."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import signal
import time
from array import array
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass

import psutil
import pytest

from cluster.api.outcomes import CallError, Outcome
from cluster.gateway.helpers.pool import HelperPool, JobLost, TooMuchCpu
from cluster.gateway.helpers.wire import Job
from cluster.gateway.text.encoding.encoding_pool import EncodingPool
from cluster.gateway.text.encoding.prompt_memory import PromptMemory
from cluster.gateway.text.encoding.text_jobs import ENCODE_HELPER_CHARS
from cluster.gateway.text.tokenizer import TextModel
from cluster.wire.bundle import Bundle
from cluster.worker.weights.tokenizer_bundle import build_bundle
from tests.gateway.text.kinds import Kind
from tests.support.keyed import eventually

pytestmark = pytest.mark.slow

TENANT, READY_S, PATIENT_S = "acme", 120.0, 1000.0
PROMPT = " ".join(f"The river {i % 700} turns the wheel, and {i % 11} boats wait." for i in range(6000))[:220_000]
RUNS = 4
LEAST_GAIN = 4.0
"""Least ratio of the CPU time that the process's other threads use if threads tokenize, to that time if helpers do.
Each is the least of several runs: other work on the machine slows a thread down, and never makes it faster."""
LONGEST_PASS = 0.5
"""Bound on the CPU time of one pass of the event loop, as a part of the CPU time that one prompt takes."""


def new_pool(kind: Kind) -> EncodingPool:
    """Return a pool of one helper process. The pool waits long for the process, because helpers run at idle priority
    and may be slow to get a core."""
    return EncodingPool(build_bundle(kind.folder), size=1, patience_s=PATIENT_S)


def new_model(bundle: Bundle) -> TextModel:
    """Return a text model whose pool waits long for its helper processes, because helpers may be slow to get a core."""
    model = TextModel.from_bundle(bundle)
    assert model.pool is not None
    model.pool.patience_s = PATIENT_S
    return model


@pytest.fixture
async def model(kinds: dict[str, Kind]) -> AsyncIterator[TextModel]:
    """Start a TextModel with a running helper."""
    model = new_model(build_bundle(kinds["llama"].folder))
    assert model.pool is not None
    assert await asyncio.wait_for(model.pool.ready(), READY_S)
    yield model
    model.pool.close()
    assert not model.pool.pids


@dataclass
class CpuTimes:
    """CPU times in seconds. `others_s`: the time of all threads except the event loop's. `longest_pass_s`: the longest
    single pass of the event loop."""

    others_s: float = 0.0
    longest_pass_s: float = 0.0


async def cpu_meanwhile(encode: Callable[[int], Awaitable[Sequence[int]]], expected: list[int]) -> CpuTimes:
    """Return the CPU times of this process while many prompts of 220 KB are tokenized. `expected`: the ids of each
    prompt."""
    times, last = CpuTimes(), time.thread_time()

    async def watch() -> None:
        nonlocal last
        while True:
            now = time.thread_time()
            times.longest_pass_s, last = max(times.longest_pass_s, now - last), now
            await asyncio.sleep(0.001)

    def others_s() -> float:
        return time.process_time() - time.thread_time()

    before_s = others_s()
    watching = asyncio.create_task(watch())
    answers = await asyncio.gather(*map(encode, range(16)))
    watching.cancel()
    times.others_s = others_s() - before_s
    assert all(list(ids) == expected for ids in answers)
    return times


async def test_long_prompts_leave_the_loop_free(model: TextModel) -> None:
    """Helpers tokenize long prompts. Meanwhile the gateway's other threads use much less CPU time than if they
    tokenized the prompts themselves. No pass of the event loop takes as long as tokenizing one prompt."""
    began_s = time.thread_time()
    expected = model.codec.encode_prompt(PROMPT)
    prompt_s = time.thread_time() - began_s
    tenants = itertools.count()  # a new tenant each time, so that nothing comes from the cache

    async def by_helpers(_: int) -> Sequence[int]:
        return await model.prompt_ids_async(f"{next(tenants)}", PROMPT)

    async def by_threads(_: int) -> Sequence[int]:
        return await asyncio.to_thread(model.codec.encode_prompt, PROMPT)

    helpers, threads = [], []
    for _ in range(RUNS):
        helpers.append(await cpu_meanwhile(by_helpers, expected))
        threads.append(await cpu_meanwhile(by_threads, expected))
        gained = min(run.others_s for run in helpers) * LEAST_GAIN < min(run.others_s for run in threads)
        if gained and min(run.longest_pass_s for run in helpers) < LONGEST_PASS * prompt_s:
            return
    pytest.fail(f"CPU with helpers: {helpers}, with threads: {threads}; one prompt: {prompt_s} s")


async def test_the_first_long_prompt_waits_for_a_helper(kinds: dict[str, Kind]) -> None:
    """A long prompt that arrives before the first helper has started waits for the helper. The gateway's own process
    does not tokenize it."""
    model = new_model(build_bundle(kinds["llama"].folder))
    assert model.pool is not None
    assert not model.pool.pids
    first = asyncio.create_task(model.prompt_ids_async(TENANT, PROMPT))
    await asyncio.wait_for(first, READY_S)
    assert model.pool.pids, "it was tokenized without one"
    own = {os.getsid(0)}
    assert own.isdisjoint(os.getsid(pid) for pid in model.pool.pids), "a helper uses up the gateway's share"
    for pid in model.pool.pids:
        assert os.sched_getscheduler(pid) == os.SCHED_IDLE
        assert os.getpriority(os.PRIO_PROCESS, pid) > os.getpriority(os.PRIO_PROCESS, 0)
    model.pool.close()


@pytest.mark.parametrize("started", [False, True])
async def test_a_pool_that_is_closed_holds_nobody(kinds: dict[str, Kind], started: bool) -> None:
    """When a pool is closed, all callers that wait for a helper get None and do the work themselves. This holds while
    the helper is starting and while it is busy."""
    pool = new_pool(kinds["llama"])
    if started:
        assert await asyncio.wait_for(pool.ready(), READY_S)
    calls = [asyncio.create_task(pool.run(("prompt_ids", (TENANT, PROMPT), {}))) for _ in range(3)]
    await asyncio.sleep(0)
    pool.close()
    assert await asyncio.wait_for(asyncio.gather(*calls), READY_S) == [None] * 3
    assert not pool.pids


async def test_messages_are_rendered_there_too(model: TextModel) -> None:
    """Long chat messages are tokenized in helper processes too. With continue_final_message, the ids are the same as
    without helpers."""
    messages = [{"role": "user", "content": PROMPT}, {"role": "assistant", "content": "It"}]
    ids = await model.chat_ids_async(TENANT, messages, continue_final_message=True)
    assert ids.tolist() == model.codec.encode_chat(messages, continue_final_message=True)


def _exploding(kinds: dict[str, Kind], pattern: str) -> Bundle:
    """Return a bundle whose tokenizer first splits a text by `pattern`."""
    bundle = build_bundle(kinds["llama"].folder)
    layout = json.loads(bundle.files["tokenizer.json"])
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    layout["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, layout["pre_tokenizer"]]}
    return Bundle({**bundle.files, "tokenizer.json": json.dumps(layout).encode()})


@pytest.mark.parametrize(("pattern", "text"), [("(a+)+$", "a" * 40 + "b"), ("(?:a|aa)+$", "a" * 60 + "b")])
async def test_an_expression_that_explodes_is_an_error(kinds: dict[str, Kind], pattern: str, text: str) -> None:
    """A text that makes an expression of the tokenizer backtrack endlessly gets an error. Without the CPU limit, 40
    characters blocked the event loop forever or made the library panic."""
    model = new_model(_exploding(kinds, pattern))
    assert model.pool is not None
    for _ in range(4):  # more often than helpers may be lost
        with pytest.raises(CallError) as error:
            await asyncio.wait_for(model.prompt_ids_async(TENANT, text), READY_S)
        assert [v.field for v in error.value.violations] == ["prompt"]
    assert (await model.prompt_ids_async(TENANT, "plain")).tolist() == model.codec.encode_prompt("plain")
    assert model.pool.failures == 0
    model.pool.close()


async def test_a_job_has_an_amount_of_cpu(kinds: dict[str, Kind]) -> None:
    """A job that exceeds the CPU limit ends its helper, and the next job gets another helper."""
    pool = new_pool(kinds["llama"])
    pool.cpu_s = 0.05
    with pytest.raises(TooMuchCpu):
        await asyncio.wait_for(pool.run(("prompt_ids", (TENANT, "x " * 20_000_000), {})), READY_S)
    pool.cpu_s = 10.0
    assert (await asyncio.wait_for(pool.run(("prompt_ids", (TENANT, "a"), {})), READY_S)) is not None
    assert pool.failures == 0
    pool.close()


async def test_a_job_that_ends_helpers_is_given_up(model: TextModel) -> None:
    """A job that has ended two helpers fails. It runs neither in a third helper nor in the gateway's own process."""
    pool = model.pool
    assert pool is not None
    lost = asyncio.create_task(pool.run(("prompt_ids", (TENANT, PROMPT * 40), {})))
    killed: set[int] = set()

    async def twice() -> bool:
        for pid in pool.pids - killed:
            killed.add(pid)
            os.kill(pid, signal.SIGKILL)
        return lost.done()

    await eventually(twice, "it is given up", READY_S)
    with pytest.raises(JobLost):
        await lost


async def test_tenants_take_turns(kinds: dict[str, Kind]) -> None:
    """A job that arrives after a hundred jobs of another tenant is among the first three jobs to run."""
    pool = new_pool(kinds["llama"])
    done: list[str] = []

    async def job(tenant: str) -> None:
        assert await pool.run(("prompt_ids", (tenant, "hello"), {}), tenant=tenant) is not None
        done.append(tenant)

    loud = [asyncio.create_task(job("loud")) for _ in range(100)]
    await asyncio.sleep(0)
    await asyncio.gather(job("quiet"), *loud)
    assert done.index("quiet") <= 2
    pool.close()


async def test_errors_are_the_callers_own(model: TextModel) -> None:
    """A helper process reports INVALID_FIELD for a text that cannot be tokenized, and then tokenizes the next text."""
    with pytest.raises(CallError) as error:
        await model.prompt_ids_async(TENANT, PROMPT + "\ud800")
    assert error.value.outcome is Outcome.INVALID_FIELD
    assert (await model.prompt_ids_async(TENANT, PROMPT)).tolist() == model.codec.encode_prompt(PROMPT)


async def test_a_lost_helper_costs_no_call(model: TextModel) -> None:
    """If a helper is killed, its jobs are still done, and a new helper starts."""
    pool = model.pool
    assert pool is not None
    expected = model.codec.encode_prompt(PROMPT)
    calls = [asyncio.create_task(model.prompt_ids_async(TENANT, PROMPT)) for _ in range(8)]
    await asyncio.sleep(0)  # the first has its helper, the others wait
    for pid in pool.pids:
        os.kill(pid, signal.SIGKILL)
    for ids in await asyncio.gather(*calls):
        assert ids.tolist() == expected
    assert await asyncio.wait_for(pool.ready(), READY_S)


async def test_what_was_sent_outlives_its_helper(kinds: dict[str, Kind]) -> None:
    """The prompt memory still has the text of a conversation's first turn after the helpers that encoded this turn have
    died. The next turn gets the same ids as without the memory."""
    memory = PromptMemory()
    model = TextModel.from_bundle(build_bundle(kinds["llama"].folder), memory=memory)
    assert model.pool is not None
    model.pool.patience_s = PATIENT_S
    pool = model.pool
    messages = [{"role": "user", "content": PROMPT}]
    assert (await model.chat_ids_async(TENANT, messages)).tolist() == model.codec.encode_chat(messages)
    held, killed = memory.bytes, pool.pids
    for pid in killed:
        os.kill(pid, signal.SIGKILL)
    while killed & pool.pids:  # the pool notices the loss of an idle helper when it sends the helper a job
        with contextlib.suppress(JobLost):
            await pool.run(("prompt_ids", (TENANT, "a"), {}))
    messages += [{"role": "assistant", "content": "It does."}, {"role": "user", "content": "And then? " * 100}]
    assert (await model.chat_ids_async(TENANT, messages)).tolist() == model.codec.encode_chat(messages)
    assert 0 < memory.bytes - held < held / 20
    pool.close()


async def test_a_second_job_runs_on_the_same_helper(kinds: dict[str, Kind]) -> None:
    """`then` makes a second job from the result of a first job. The second job runs on the same helper, before all
    waiting jobs. An error of the first job ends the call."""
    pool = new_pool(kinds["llama"])

    async def call(text: str) -> list[bytes]:
        begin: Job = ("begin", (("prompt_text", (text,), {}),), {})
        answer: list[bytes] = await pool.run(begin, then=lambda digests: ("finish", (array("I", [0]), "prompt"), {}))
        return answer

    texts = [f"{i} " * 3000 for i in range(10)]
    answers = await asyncio.wait_for(asyncio.gather(*map(call, texts)), READY_S)
    assert answers == [await call(text) for text in texts]
    assert len({ids for (ids,) in answers}) == 10
    with pytest.raises(CallError):
        await call("\ud800" + texts[0])
    pool.close()


@pytest.fixture
async def stuck(kinds: dict[str, Kind]) -> AsyncIterator[EncodingPool]:
    """Start a pool whose only helper is stopped by a signal, so it is late for any job."""
    pool = EncodingPool(build_bundle(kinds["llama"].folder), size=1, patience_s=0.2)
    assert await asyncio.wait_for(pool.ready(), READY_S)
    (pid,) = pool.pids
    os.kill(pid, signal.SIGSTOP)
    yield pool
    pool.close()


async def test_nobody_waits_for_a_helper_that_gets_no_core(stuck: EncodingPool) -> None:
    """If a helper is stopped, its caller and the callers that wait for it get None and do the work themselves. Once the
    helper runs again, the pool uses it again."""
    calls = [asyncio.create_task(stuck.run(("prompt_ids", (TENANT, PROMPT), {}))) for _ in range(3)]
    assert await asyncio.wait_for(asyncio.gather(*calls), READY_S) == [None] * 3
    assert await asyncio.wait_for(stuck.run(("prompt_ids", (TENANT, PROMPT), {})), READY_S) is None
    (pid,) = stuck.pids
    os.kill(pid, signal.SIGCONT)

    async def used() -> bool:
        return await stuck.run(("prompt_ids", (TENANT, PROMPT), {})) is not None

    await eventually(used, "the helper is used again", READY_S)
    assert stuck.pids == {pid}


async def test_a_helper_is_late_without_its_caller_too(stuck: EncodingPool) -> None:
    """If a helper process is stopped by a signal, and its caller is cancelled before the helper counts as late, later
    callers still do not wait for this helper."""
    gone = asyncio.create_task(stuck.run(("prompt_ids", (TENANT, PROMPT), {})))
    await asyncio.sleep(0)
    gone.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await gone
    assert await asyncio.wait_for(stuck.run(("prompt_ids", (TENANT, PROMPT), {})), READY_S) is None


async def test_nobody_waits_for_a_start_that_gets_no_core(kinds: dict[str, Kind]) -> None:
    """If a helper is stopped while it starts, callers get None and do the work themselves. Once it runs again, the pool
    uses it."""
    bundle = build_bundle(kinds["llama"].folder).pack()
    before = set(psutil.Process().children())
    stopped: list[psutil.Process] = []

    def stop_newest() -> tuple[str, bytes]:
        (started,) = set(psutil.Process().children()) - before
        started.suspend()
        stopped.append(started)
        return "text", bundle

    pool = HelperPool(stop_newest, size=1, patience_s=0.2)
    job: Job = ("prompt_ids", (TENANT, PROMPT), {})
    calls = [asyncio.create_task(pool.run(job)) for _ in range(3)]
    assert await asyncio.wait_for(asyncio.gather(*calls), READY_S) == [None] * 3
    assert await asyncio.wait_for(pool.run(job), READY_S) is None
    stopped[0].resume()
    assert await asyncio.wait_for(pool.ready(), READY_S)
    assert pool.pids == {stopped[0].pid}
    pool.close()
    assert len(stopped) == 1


async def test_gone_callers_leave_helpers_usable(model: TextModel) -> None:
    """Calls that are cancelled while they wait or run do not change the answers to other calls."""
    expected = model.codec.encode_prompt(PROMPT)
    others = ["other " * (n + ENCODE_HELPER_CHARS) for n in range(6)]
    doomed = [asyncio.create_task(model.prompt_ids_async(TENANT, text)) for text in others]
    await asyncio.sleep(0)
    kept = asyncio.create_task(model.prompt_ids_async(TENANT, PROMPT))
    await asyncio.sleep(0)
    for task in doomed:
        task.cancel()
    for task in doomed:
        with contextlib.suppress(asyncio.CancelledError):
            await task
    assert (await kept).tolist() == expected
    assert (await model.prompt_ids_async(TENANT, PROMPT)).tolist() == expected


async def test_without_helpers_threads_do_it(kinds: dict[str, Kind]) -> None:
    """After a pool was closed, a long prompt is tokenized in a thread, with the same ids."""
    model = TextModel.from_bundle(build_bundle(kinds["mistral"].folder))
    assert model.pool is not None
    model.pool.close()
    assert not await model.pool.ready()
    assert (await model.prompt_ids_async(TENANT, PROMPT)).tolist() == model.codec.encode_prompt(PROMPT)


async def test_helpers_that_cannot_read_are_given_up(kinds: dict[str, Kind]) -> None:
    """A pool starts no further helper after three helpers have failed to start."""
    pool = EncodingPool(Bundle({"tokenizer.json": b"{}"}), size=1)
    for _ in range(5):
        assert await pool.run(("prompt_ids", (TENANT, "a"), {})) is None
        assert not await asyncio.wait_for(pool.ready(), READY_S)
    assert pool.failures == 3
