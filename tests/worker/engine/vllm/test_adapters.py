"""Adapters on a real engine: each request gets its adapter's tokens, and no adapter can end the engine."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cluster.api.adapters import ADAPTERS
from cluster.api.kv_events import BlocksStored
from cluster.api.outcomes import Outcome
from cluster.api.ports import EngineRefused
from cluster.api.types import EngineRequest, FinishReason
from cluster.worker.engine.vllm.engine import VllmEngine
from cluster.worker.weights.adapter import CONFIG, WEIGHTS
from tests.support.adapters import write_adapter
from tests.support.merged_adapters import MergedAdapters
from tests.worker.engine.conftest import DEADLINE_S, TOKEN_HI, TOKEN_LO, tiny_spec
from tests.worker.engine.contract import Answer, Driver, Subject, request

pytestmark = pytest.mark.engine

SLOTS, CAPACITY, RANK = 3, 4, 8
ANSWER_TOKENS = 16
ENGINE = {
    "kv_cache_memory_bytes": 64 << 20,
    "max_num_seqs": 8,
    "max_num_batched_tokens": 128,
    "block_size": 32,
    "enable_lora": True,
    "max_loras": SLOTS,
    "max_cpu_loras": CAPACITY,
    "max_lora_rank": RANK,
}


@pytest.fixture(scope="module")
def adapters(llama_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> MergedAdapters:
    """Adapters of the tiny model."""
    return MergedAdapters(llama_folder, tmp_path_factory.mktemp("adapters"), rank=RANK)


@pytest.fixture(scope="module")
async def subject(llama_folder: Path) -> AsyncIterator[Subject]:
    """Start an engine that can run three adapters at a time and keeps four adapters in memory."""
    engine = VllmEngine(tiny_spec(engine=ENGINE), llama_folder)
    try:
        info = await engine.start()
        yield Subject(engine, info, TOKEN_LO, TOKEN_HI, DEADLINE_S)
    finally:
        await engine.close()


@pytest.fixture
async def engine(subject: Subject) -> AsyncIterator[VllmEngine]:
    """Provide the engine, and unload all its adapters after the test."""
    engine = subject.engine
    assert isinstance(engine, VllmEngine)
    yield engine
    for digest in list(engine._adapters._held):
        await engine.unload_adapter(digest)
    await Driver(subject).empty()


def with_adapter(
    folder: Path | None, prompt: Sequence[int], max_tokens: int = ANSWER_TOKENS, **changes: object
) -> EngineRequest:
    """Return a greedy request for the adapter in `folder`, or for the base model if `folder` is None."""
    asked = request(prompt, max_tokens, **changes)
    return replace(asked, adapter=folder.name if folder else "")


async def load(engine: VllmEngine, adapters: MergedAdapters, *numbers: int) -> dict[int, Path | None]:
    """Load the adapters with these numbers; return the folder of each number. The number 0, the base model, has
    None."""
    folders: dict[int, Path | None] = {0: None}
    for number in numbers:
        folder = folders[number] = adapters.folder(number)
        await engine.load_adapter(folder.name, str(folder), pinned=False)
    return folders


def tokens(answers: Sequence[Answer]) -> list[tuple[int, ...]]:
    """Return the tokens of answers."""
    return [answer.token_ids for answer in answers]


async def test_it_says_what_it_holds(subject: Subject) -> None:
    assert (subject.info.adapter_slots, subject.info.adapter_capacity) == (SLOTS, CAPACITY)
    assert ADAPTERS in subject.info.capabilities


async def test_base_and_adapters_in_one_batch(subject: Subject, engine: VllmEngine, adapters: MergedAdapters) -> None:
    """With all slots full, each request of a batch gets the tokens of its adapter, or of the base model.

    Without the repair of vLLM's CPU operations, requests for the base model would use the adapter in the last slot.
    """
    folders = await load(engine, adapters, 1, 2, 3)
    for order in ([0, 1, 2, 3, 0], [3, 0, 1, 0, 2]):
        prompt = subject.prompt(order[0] + 5, tokens=40)
        answers = await Driver(subject).run(*(with_adapter(folders[number], prompt) for number in order))
        expected = [adapters.merged_tokens(number, prompt, ANSWER_TOKENS) for number in order]
        assert len(set(expected)) == 4, "each adapter changes the tokens"
        assert tokens(answers) == expected


async def test_more_adapters_than_slots(subject: Subject, engine: VllmEngine, adapters: MergedAdapters) -> None:
    """Four adapters share three slots. Requests for each of them and for the base model get the right tokens."""
    folders = await load(engine, adapters, 1, 2, 3, 4)
    prompt = subject.prompt(11, tokens=33)
    order = [4, 0, 1, 2, 3, 1, 4]
    answers = await Driver(subject).run(*(with_adapter(folders[number], prompt) for number in order))
    assert tokens(answers) == [adapters.merged_tokens(number, prompt, ANSWER_TOKENS) for number in order]


async def test_what_is_not_loaded_is_refused(subject: Subject, engine: VllmEngine, adapters: MergedAdapters) -> None:
    """The engine refuses to load more adapters than it has capacity for. It also refuses a request for an adapter that
    is unknown or not loaded. vLLM is not called in either case."""
    folders = await load(engine, adapters, 1, 2, 3, 4)
    more = adapters.folder(5)
    with pytest.raises(EngineRefused) as refusal:
        await engine.load_adapter(more.name, str(more), pinned=False)
    assert refusal.value.reason == Outcome.ADAPTER_INVALID.name
    prompt = subject.prompt(12)
    one = folders[1]
    assert one is not None
    await engine.unload_adapter(one.name)
    await engine.unload_adapter("f" * 64)
    for folder in (one, more, Path("f" * 64), Path("x" * 5000)):
        with pytest.raises(EngineRefused) as refusal:
            await engine.submit(with_adapter(folder, prompt))
        assert (refusal.value.reason, refusal.value.field) == (Outcome.ADAPTER_INVALID.name, "adapter")
    await engine.load_adapter(more.name, str(more), pinned=False)
    (answer,) = await Driver(subject).run(with_adapter(more, prompt))
    assert answer.token_ids == adapters.merged_tokens(5, prompt, ANSWER_TOKENS)


async def test_an_unloaded_adapter_serves_its_requests_to_the_end(
    subject: Subject, engine: VllmEngine, adapters: MergedAdapters
) -> None:
    """While an adapter is unloaded, new requests for it are refused, and a running request is finished. Then the
    adapter can be loaded again."""
    folders = await load(engine, adapters, 1)
    folder, prompt = folders[1], subject.prompt(13, tokens=20)
    assert folder is not None
    running = with_adapter(folder, prompt, max_tokens=40)
    await engine.submit(running)
    outputs = list(await engine.step())
    unload = asyncio.create_task(engine.unload_adapter(folder.name))
    await asyncio.sleep(0)  # the task runs until it waits for the request
    with pytest.raises(EngineRefused):
        await engine.submit(with_adapter(folder, prompt))
    while outputs[-1].finish is None:
        assert not unload.done()
        outputs += await engine.step()
    await unload
    assert tuple(token for output in outputs for token in output.token_ids) == adapters.merged_tokens(1, prompt, 40)
    await load(engine, adapters, 1)
    (answer,) = await Driver(subject).run(with_adapter(folder, prompt))
    assert answer.token_ids == adapters.merged_tokens(1, prompt, ANSWER_TOKENS)


async def test_a_request_with_an_adapter_is_resumed(
    subject: Subject, engine: VllmEngine, adapters: MergedAdapters
) -> None:
    """A request with an adapter is interrupted after some tokens and resumed. The remaining tokens equal those of an
    uninterrupted request, both with greedy sampling and with a seed."""
    folders = await load(engine, adapters, 2)
    prompt = subject.prompt(14, tokens=40)
    samplings: tuple[dict[str, Any], ...] = ({}, {"temperature": 1.0, "seed": 7, "presence_penalty": 0.5})
    for sampling in samplings:
        (whole,) = await Driver(subject).run(with_adapter(folders[2], prompt, **sampling))
        for cut in (1, 7, ANSWER_TOKENS - 1):
            again = with_adapter(folders[2], prompt, **sampling)
            resumed = replace(again, emitted_token_ids=whole.token_ids[:cut])
            (rest,) = await Driver(subject).run(resumed)
            assert rest.token_ids == whole.token_ids[cut:]


@pytest.mark.parametrize("name", ["cut off", "no folder", "rank above the bound", "no tensors of its own"])
async def test_a_failed_load_leaves_the_engine_alive(
    subject: Subject, engine: VllmEngine, adapters: MergedAdapters, tmp_path: Path, llama_folder: Path, name: str
) -> None:
    """If an adapter's files are missing, damaged or not supported, vLLM's load of the adapter fails with
    ADAPTER_INVALID. Other requests continue, and further adapters can be loaded. Headrace's own check of the files is
    not used here."""
    await load(engine, adapters, 1)
    folder = tmp_path / "broken"
    if name != "no folder":
        write_adapter(folder, llama_folder, 2 * RANK if name == "rank above the bound" else RANK)
    if name == "cut off":
        content = (folder / WEIGHTS).read_bytes()
        (folder / WEIGHTS).write_bytes(content[: len(content) // 2])
    if name == "no tensors of its own":
        config = json.loads((folder / CONFIG).read_text())
        (folder / CONFIG).write_text(json.dumps(config | {"use_dora": True}))
    prompt = subject.prompt(15, tokens=20)
    beside = asyncio.create_task(Driver(subject).run(with_adapter(adapters.folder(1), prompt), request(prompt)))
    with pytest.raises(EngineRefused) as refusal:
        await engine.load_adapter("e" * 64, str(folder), pinned=False)
    assert refusal.value.reason == Outcome.ADAPTER_INVALID.name
    first, second = await beside
    assert first.token_ids[:5] == adapters.merged_tokens(1, prompt, 5)
    assert second.finish is FinishReason.LENGTH
    await load(engine, adapters, 1, 2, 3, 4)  # a failed load occupies no place


async def test_blocks_are_reported_with_the_adapter(
    subject: Subject, engine: VllmEngine, adapters: MergedAdapters
) -> None:
    """Only requests for the same adapter find an adapter's KV blocks in the cache. The KV events name the adapter's
    digest."""
    folders = await load(engine, adapters, 1, 2)
    names = {folder.name if folder else "" for folder in folders.values()}
    prompts: list[tuple[int, ...]] = []
    seen: dict[tuple[int, ...], set[str]] = {}

    async def collect() -> None:
        while True:
            for event in await engine.kv_events():
                if isinstance(event, BlocksStored):
                    seen.setdefault(tuple(event.token_ids[:32]), set()).add(event.adapter)

    collecting = asyncio.create_task(collect())
    try:
        async with asyncio.timeout(subject.deadline_s):
            while not any(seen.get(prompt[:32]) == names for prompt in prompts):  # the first events may come too early
                prompts.append(prompt := subject.prompt(16 + len(prompts), tokens=100))
                cached = []
                for number in (1, 1, 2, 0, 2, 0):
                    (answer,) = await Driver(subject).run(with_adapter(folders[number], prompt, max_tokens=1))
                    cached.append(answer.outputs[0].cached_tokens)
                assert cached == [0, 96, 0, 0, 96, 96]
    finally:
        collecting.cancel()
        await asyncio.gather(collecting, return_exceptions=True)
