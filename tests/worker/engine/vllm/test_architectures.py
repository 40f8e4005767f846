"""Tiny models of many architectures on the real engine: each is right alone, from its cache, in a crowd and cut, or it
does not start."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from cluster.api.ports import EngineDead
from cluster.api.types import RESUME_EXACT, EngineInfo, ModelSpec
from cluster.cli.model_sizes import model_size
from cluster.worker.engine.golden_check import CheckedEngine
from cluster.worker.engine.vllm.engine import VllmEngine
from tests.support.architectures import SERVED, save_served
from tests.worker.engine.contract import Answer, Driver, Subject, request

pytestmark = [pytest.mark.engine, pytest.mark.long]

ANSWER_TOKENS = 16
CACHE_BYTES, STEP_TOKENS = 256 << 20, 512
TOLERANCE = 2e-3
"""Largest difference of a log probability, which an error of a kernel exceeds by far."""
REFUSED = {"jamba": "JambaForCausalLM needs; serve it on GPUs"}
"""Architectures that vLLM's CPU build does not run, each with a part of the reason."""


def prompt(seed: int, tokens: int) -> tuple[int, ...]:
    """Return a random prompt."""
    chance = random.Random(seed)
    return tuple(chance.randrange(10, 500) for _ in range(tokens))


def logprobs(answer: Answer) -> list[float]:
    """Return the log probability of each token of an answer."""
    return [position.logprobs[0] for position in answer.logprobs]


def why_not_as_transformers(folder: Path, prompts: Sequence[Sequence[int]], answers: Sequence[Answer]) -> str:
    """Return in words where an answer's tokens are not transformers' likeliest, or their log probabilities differ."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    for tokens, answer in zip(prompts, answers, strict=True):
        with torch.no_grad():
            rows = model(torch.tensor([[*tokens, *answer.token_ids]])).logits[0].double().log_softmax(-1)
        for at, (token, value) in enumerate(zip(answer.token_ids, logprobs(answer), strict=True)):
            row = rows[len(tokens) - 1 + at]
            if max(abs(float(row[token]) - value), float(row.max() - row[token])) > TOLERANCE:
                return f"{len(tokens)} prompt tokens, token {at}: {value}, transformers has {float(row[token])}"
    return ""


def planned_tokens(entry: ModelSpec, folder: Path, info: EngineInfo) -> float:
    """Return how many tokens of calls of the greatest length fit into the KV cache, as `headrace plan` calculates."""
    cache = model_size(replace(entry, source=str(folder))).shape.cache
    if not cache.token_bytes:  # vLLM counts the blocks of sliding layers alone, not calls
        return CACHE_BYTES / cache.window_bytes
    assert entry.max_model_len is not None
    call = cache.sequence_bytes(entry.max_model_len, STEP_TOKENS, info.block_size)
    return CACHE_BYTES / call * entry.max_model_len


@pytest.mark.parametrize("model_type", SERVED)
async def test_an_architecture_is_right_or_refused(tmp_path: Path, model_type: str) -> None:
    """Greedy answers to short and long prompts equal transformers'. Repeated with cached blocks, in a crowd, and cut
    and resumed, they are the same."""
    folder = save_served(model_type, tmp_path)
    sizes = {"kv_cache_memory_bytes": CACHE_BYTES, "max_num_seqs": 8, "max_num_batched_tokens": STEP_TOKENS}
    entry = ModelSpec("m", "unused", dtype="float32", max_model_len=2048, engine={**sizes, "skip_tokenizer_init": True})
    engine = CheckedEngine(VllmEngine(entry, folder, executor="mp"))
    try:
        if model_type in REFUSED:
            with pytest.raises(EngineDead, match=REFUSED[model_type]):
                await engine.start()
            return
        info = await engine.start()
        assert RESUME_EXACT in info.capabilities, engine.downgrade_reason
        assert info.kv_blocks * info.block_size == pytest.approx(planned_tokens(entry, folder, info), rel=0.03)
        driver = Driver(Subject(engine, info, 10, 500))
        prompts = [prompt(1, 5), prompt(2, 150), prompt(3, 1000)]

        async def run(salt: str, *cuts: tuple[int, ...], mates: int = 0) -> list[Answer]:
            requests = [
                request(
                    tokens,
                    max_tokens=ANSWER_TOKENS,
                    logprobs=0,
                    cache_salt=f"{salt}{len(tokens)}",
                    emitted_token_ids=emitted,
                )
                for tokens, emitted in zip(prompts, cuts or [()] * len(prompts), strict=True)
            ]
            others = [request(prompt(90 + i, 30 + 97 * i), cache_salt=salt) for i in range(mates)]
            return (await driver.run(*requests, *others))[: len(prompts)]

        alone = [
            (await driver.run(request(p, max_tokens=ANSWER_TOKENS, logprobs=0, cache_salt=f"a{len(p)}")))[0]
            for p in prompts
        ]
        for answers in (await run("a"), await run("crowd", mates=4), await run("crowd", mates=4)):
            assert [answer.token_ids for answer in answers] == [answer.token_ids for answer in alone]
        for at in (1, 7):
            rests = await run(f"cut{at}", *(answer.token_ids[:at] for answer in alone), mates=2)
            assert [rest.token_ids for rest in rests] == [answer.token_ids[at:] for answer in alone]
    finally:
        await engine.close()
    assert not why_not_as_transformers(folder, prompts, alone)
