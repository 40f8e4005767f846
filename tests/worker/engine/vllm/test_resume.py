"""Tests of exact resume on a real vLLM engine: with chunked prefills, preemption, two ranks and bad ids. The engine
contract has further tests of resume."""

from __future__ import annotations

import asyncio
import dataclasses
import inspect
import json
import random
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest

from cluster.api.ports import EngineRefused
from cluster.api.types import (
    RESUME_EXACT,
    RESUME_PLAIN,
    EngineRequest,
    FinishReason,
    Grammar,
    TokenOutput,
    without_seed_noise,
)
from cluster.worker.engine.vllm import resume
from cluster.worker.engine.vllm.engine import VllmEngine
from cluster.worker.engine.vllm.private_names import digest, missing, resolve
from tests.worker.engine.conftest import TOKEN_HI, TOKEN_LO, schedules_asynchronously, tiny_spec
from tests.worker.engine.contract import Driver, Subject, cut_everywhere, request

pytestmark = pytest.mark.engine

MIXED: tuple[dict[str, object], ...] = (
    {},
    {"temperature": 1.0, "seed": 5},
    {"frequency_penalty": 0.7, "presence_penalty": 0.3},
    {"temperature": 0.8, "seed": 9, "repetition_penalty": 1.2, "frequency_penalty": 0.4},
    {"temperature": 1.0, "seed": 6, "grammar": Grammar("regex", "[a-z]{600}"), "ignore_eos": False},
    {"logprobs": 2},
)


def mixed(subject: Subject, count: int, prompt_tokens: int, max_tokens: int) -> list[EngineRequest]:
    """Return long requests of all kinds that this engine can resume."""
    kinds = [kind for kind in MIXED if subject.resumes_seeds or "seed" not in kind]
    return [
        request(subject.prompt(200 + i, tokens=prompt_tokens + i), max_tokens=max_tokens, **kinds[i % len(kinds)])
        for i in range(count)
    ]


def cut(whole: EngineRequest, emitted: Sequence[int]) -> EngineRequest:
    """Return a copy of a request, with a new id, that resumes after the tokens `emitted`."""
    return dataclasses.replace(whole, request_id=request(()).request_id, emitted_token_ids=emitted)


async def cut_in_crowds(driver: Driver, wholes: Sequence[EngineRequest], seed: int) -> None:
    """Interrupt every request at a random token, resume all requests together, and compare their outputs with those of
    the uninterrupted requests."""
    chance = random.Random(seed)
    pairs = [(w, a) for w, a in zip(wholes, await driver.run(*wholes), strict=True) if len(a.token_ids) > 1]
    assert len(pairs) > len(wholes) // 2
    cuts = [chance.randrange(1, len(answer.token_ids)) for _, answer in pairs]
    rests = [cut(w, a.token_ids[:k]) for (w, a), k in zip(pairs, cuts, strict=True)]
    for answer, (_, whole), k in zip(await driver.run(*rests), pairs, cuts, strict=True):
        assert answer.token_ids == whole.token_ids[k:]
        assert answer.end == whole.end


@pytest.mark.parametrize("path", resume.SYMBOLS)
def test_this_vllm_has_every_name(path: str) -> None:
    """The installed vLLM has each private name that exact resume uses."""
    assert missing({path: resume.SYMBOLS[path]}) == []


def test_the_core_admits_as_the_continuation_expects() -> None:
    """vLLM's scheduler has the two properties on which exact resume relies. It sets a request's prefill statistics only
    if `request.prefill_stats` is truthy. It records cache hits at one place only."""
    source = inspect.getsource(resolve("vllm.v1.core.sched.scheduler.Scheduler.schedule"))
    assert "if request.prefill_stats and request.num_preemptions <= 0:" in source
    assert source.count("self.kv_cache_manager.record_prefix_cache_stats(") == 1


def test_the_v2_runner_gets_prompt_and_output_apart() -> None:
    """vLLM's scheduler sends the V2 runner the tokens of a prompt and, in a second list, the prompt followed by the
    tokens that were already emitted. The test finds this in the scheduler's source text."""
    source = inspect.getsource(resolve("vllm.v1.core.sched.scheduler.Scheduler.schedule"))
    assert source.count("req._all_token_ids") == 1


def test_the_draw_of_a_seed_is_known_by_its_source() -> None:
    """The table DRAWS has an entry for the installed sampler, under the digest of the sampler's code. Without an entry,
    no engine with other code could resume this engine's seeded requests, because it might draw other random numbers."""
    sampler = digest("vllm.v1.sample.ops.topk_topp_sampler.TopKTopPSampler.forward_cpu")
    assert sampler in resume.DRAWS


@pytest.mark.thorough
async def test_long_calls_are_continued_through_chunks(fast_subject: Subject, public_subject: Subject) -> None:
    """Requests with prompts of several chunks and hundreds of emitted tokens are resumed, twelve at a time on eight
    slots."""
    for seed, subject in enumerate((fast_subject, public_subject)):
        assert RESUME_EXACT in subject.info.capabilities
        driver = Driver(subject)
        await cut_in_crowds(driver, mixed(subject, 12, prompt_tokens=290, max_tokens=260), seed)
        await driver.empty()


CHOICES: dict[str, tuple[object, ...]] = {
    "temperature": (0.0, 0.6, 1.0),
    "top_p": (1.0, 0.8),
    "top_k": (0, 30),
    "min_p": (0.0, 0.02),
    "frequency_penalty": (0.0, 0.5, -0.3),
    "presence_penalty": (0.0, 0.9),
    "repetition_penalty": (1.0, 1.2, 0.9),
    "logit_bias": ({}, {330: 3.0, 340: -5.0}),
    "logprobs": (None, 0, 4),
    "min_tokens": (0, 12, 25),
    "stop_token_ids": ((), (310, 350, 390, 430)),
    "ignore_eos": (True, False),
    "grammar": (None, None, Grammar("regex", "[a-z ]{30,}"), Grammar("json_object", "")),
}


@pytest.mark.parametrize("seed", range(3))
async def test_any_combination_is_continued(fast_subject: Subject, seed: int) -> None:
    """A request with a seed and random parameters is interrupted at a random token. When it is resumed, it gets the
    remaining tokens of the uninterrupted request."""
    chance = random.Random(seed)
    choices = CHOICES if fast_subject.resumes_seeds else CHOICES | {"temperature": (0.0,)}
    wholes = [
        request(
            fast_subject.prompt(chance.randrange(10**6), tokens=chance.choice([3, 40, 150])),
            max_tokens=40,
            seed=chance.randrange(1000),
            **{name: chance.choice(values) for name, values in choices.items()},
        )
        for _ in range(24)
    ]
    for again in range(3):
        await cut_in_crowds(Driver(fast_subject), [cut(whole, ()) for whole in wholes], 10 * seed + again)


async def test_emitted_tokens_come_from_the_cache(fast_subject: Subject) -> None:
    """If a request is resumed on the engine that emitted its tokens, its KV blocks are found in the cache."""
    driver, size = Driver(fast_subject), fast_subject.info.block_size
    whole = request(fast_subject.prompt(210, tokens=size), max_tokens=12 * size, cache_salt="found-again")
    (uncut,) = await driver.run(whole)
    before = fast_subject.engine.load().steps
    rest = request(
        whole.prompt_token_ids,
        max_tokens=12 * size,
        emitted_token_ids=uncut.token_ids[:-1],
        cache_salt="found-again",
    )
    (answer,) = await driver.run(rest)
    assert answer.token_ids == uncut.token_ids[-1:]
    assert answer.outputs[0].cached_tokens == size
    # One step may be the uncut request's last, and asynchronous scheduling adds one; 415 tokens would take 4 chunks.
    assert fast_subject.engine.load().steps - before <= 2 + schedules_asynchronously(fast_subject)


async def test_abort_in_the_middle_of_a_replay(fast_subject: Subject) -> None:
    """Resumed requests that are aborted while their emitted tokens are computed leave nothing behind, and do not affect
    other requests."""
    driver = Driver(fast_subject)
    (alone,) = await driver.run(request(fast_subject.prompt(211), max_tokens=40))
    for rounds in range(3):
        stays = await driver.submit(request(fast_subject.prompt(211), max_tokens=40))
        doomed = [
            await driver.submit(cut(whole, fast_subject.prompt(220 + rounds, tokens=200)))
            for whole in mixed(fast_subject, 4, prompt_tokens=400, max_tokens=260)[:4]
        ]
        for _ in range(rounds):
            await driver.step()
        await driver.abort(doomed)
        await driver.until(lambda stays=stays: driver.answers[stays].finish is not None)  # type: ignore[misc]
        assert driver.answers[stays].token_ids == alone.token_ids
    await driver.empty()


async def test_a_duplicate_of_a_continued_call_is_refused(fast_subject: Subject) -> None:
    """A second resumed request with the same id is refused, and the tokens of the first request are right."""
    driver = Driver(fast_subject)
    (uncut,) = await driver.run(request(fast_subject.prompt(212), max_tokens=20))
    rest = request(fast_subject.prompt(212), max_tokens=20, emitted_token_ids=uncut.token_ids[:7])
    await driver.submit(rest)
    with pytest.raises(EngineRefused, match="used before"):
        await fast_subject.engine.submit(rest)
    await driver.until(lambda: driver.answers[rest.request_id].finish is not None)
    assert driver.answers[rest.request_id].token_ids == uncut.token_ids[7:]


async def test_tokens_against_the_grammar_end_their_call_alone(fast_subject: Subject, public_subject: Subject) -> None:
    """If the grammar does not allow the emitted ids, the request ends in an error. Another request continues."""
    for subject in (fast_subject, public_subject):
        driver = Driver(subject)
        (alone,) = await driver.run(request(subject.prompt(213), max_tokens=30))
        beside = await driver.submit(request(subject.prompt(213), max_tokens=30))
        (answer,) = await driver.run(
            request(
                subject.prompt(214),
                max_tokens=50,
                emitted_token_ids=subject.prompt(215, tokens=9),
                grammar=Grammar("regex", "[0-9]{40}"),
                ignore_eos=False,
            )
        )
        assert (answer.finish, answer.token_ids) == (FinishReason.ERROR, ())
        if subject is fast_subject:
            assert "do not follow response_format" in answer.outputs[-1].message
        await driver.until(lambda driver=driver, beside=beside: driver.answers[beside].finish is not None)  # type: ignore[misc]
        assert driver.answers[beside].token_ids == alone.token_ids
        await driver.empty()


class Crowded(Driver):
    """A driver that records whether a running request was preempted."""

    preempted = False

    async def step(self) -> Sequence[TokenOutput]:
        """Run one step and record whether a request was preempted."""
        outputs = await super().step()
        begun = [a for a in self.answers.values() if a.outputs and a.finish is None]
        unbegun = [a for a in self.answers.values() if not a.outputs]
        self.preempted |= not unbegun and self.engine.load().running < len(begun)
        return outputs


@pytest.mark.parametrize(
    ("ranks", "count", "max_tokens"), [(1, 8, 130), pytest.param(2, 6, 40, marks=pytest.mark.long)]
)
async def test_preempted_calls_are_continued(llama_folder: Path, ranks: int, count: int, max_tokens: int) -> None:
    """If there are too few KV blocks, preempted requests are resumed exactly, on one rank and on two ranks."""
    few_blocks = {**tiny_spec().engine, "num_gpu_blocks_override": 40}
    engine = VllmEngine(tiny_spec(tensor_parallel_size=ranks, engine=few_blocks), llama_folder, executor="mp")
    info = await engine.start()
    try:
        name = without_seed_noise(info.engine_class)
        assert (name.startswith("float32-"), name.endswith(f"-tp{ranks}-pp1"), info.kv_blocks) == (True, True, 40)
        assert RESUME_EXACT in info.capabilities
        driver = Crowded(Subject(engine, info, TOKEN_LO, TOKEN_HI, deadline_s=240.0))
        await cut_in_crowds(driver, mixed(driver.subject, count, 140, max_tokens), seed=1)
        assert driver.preempted or ranks > 1, "the KV cache should be too small for all requests"
        await driver.empty()
    finally:
        await engine.close()


def with_thinking(folder: Path, made: Path) -> tuple[int, int]:
    """Copy a Llama checkpoint, turn two unused special tokens into <think> and </think>, and return their ids."""
    shutil.copytree(folder, made)
    file = made / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    ids = []
    for old, new in (("<|python_tag|>", "<think>"), ("<|eom_id|>", "</think>")):
        (token,) = [added for added in tokenizer["added_tokens"] if added["content"] == old]
        token["content"] = new
        ids.append(int(token["id"]))
        tokenizer["model"]["vocab"] = {
            new if name == old else name: i for name, i in tokenizer["model"]["vocab"].items()
        }
    file.write_text(json.dumps(tokenizer))
    return ids[0], ids[1]


async def greedy_bias(subject: Subject, prompt: Sequence[int], token: int) -> float:
    """Return a bias with which greedy decoding emits 3 to 17 other tokens and then `token`."""
    for tenths in range(1, 60):
        (answer,) = await Driver(subject).run(request(prompt, max_tokens=18, logit_bias={token: tenths / 10}))
        if token in answer.token_ids:
            assert answer.token_ids.index(token) > 2, f"a bias of {tenths / 10} is too much, and less is too little"
            return tenths / 10
    raise AssertionError("no bias is enough")


async def test_a_grammar_behind_reasoning_is_continued(llama_folder: Path, tmp_path: Path) -> None:
    """A resume continues a request exactly, even if its grammar applies only after the reasoning. This holds whether
    the request was cut during the reasoning or after it."""
    begin, end = with_thinking(llama_folder, tmp_path / "thinking")
    engine = VllmEngine(tiny_spec(), tmp_path / "thinking", executor="mp", reasoning_parser="qwen3")
    info = await engine.start()
    try:
        subject = Subject(engine, info, TOKEN_LO, TOKEN_HI, deadline_s=240.0)
        prompt = (*subject.prompt(60), begin)
        changes: dict[str, object] = {"grammar": Grammar("regex", "[a-f]{3}(-[a-f]{3})+")}
        if subject.resumes_seeds:
            changes |= {"temperature": 1.0, "seed": 7, "logit_bias": {end: 6.0}}
        else:
            changes["logit_bias"] = {end: await greedy_bias(subject, prompt, end)}
        uncut = await cut_everywhere(subject, prompt, 24, changes)
        reasoning = uncut.token_ids.index(end)
        assert 2 < reasoning < 18, "both parts are cut"
        await Driver(subject).empty()
    finally:
        await engine.close()


async def test_an_engine_that_cannot_says_so_and_refuses(llama_folder: Path) -> None:
    """An engine that cannot resume exactly reports this in its capabilities. It resumes greedy requests as new prompts
    and refuses to resume others."""
    engine = VllmEngine(tiny_spec(), llama_folder, exact_resume=False)
    info = await engine.start()
    try:
        assert RESUME_PLAIN in info.capabilities
        assert RESUME_EXACT not in info.capabilities
        subject = Subject(engine, info, TOKEN_LO, TOKEN_HI)
        driver = Driver(subject)
        for whole in mixed(subject, 6, prompt_tokens=40, max_tokens=30):
            (uncut,) = await driver.run(whole)
            rest = cut(whole, uncut.token_ids[:11])
            sampling = whole.sampling
            seed_goes_on = info.engine_class.endswith("-v2") and sampling.grammar is None
            if (sampling.seed is None or seed_goes_on) and sampling.frequency_penalty == 0:
                (answer,) = await driver.run(rest)
                assert answer.token_ids == uncut.token_ids[11:]
                continue
            with pytest.raises(EngineRefused) as refusal:
                await engine.submit(rest)
            assert refusal.value.reason == "RESUME_UNSUPPORTED"
    finally:
        await asyncio.wait_for(engine.close(), 60)
