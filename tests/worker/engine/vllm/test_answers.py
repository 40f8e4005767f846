"""The real engine gives the same outputs as transformers, and the fast path gives the same outputs as AsyncLLM."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from cluster.api.types import Grammar
from cluster.worker.engine.vllm.packed_ids import MIN_IDS
from tests.worker.engine.contract import Answer, Driver, Subject, request

pytestmark = pytest.mark.engine


@pytest.fixture(scope="session")
def reference(llama_folder: Path) -> Any:
    """Provide the model of `llama_folder`, loaded by transformers in float32."""
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(llama_folder, dtype=torch.float32).eval()


def _greedy(reference: Any, prompt: Sequence[int], tokens: int) -> tuple[int, ...]:
    import torch

    with torch.no_grad():
        out = reference.generate(
            torch.tensor([list(prompt)]), max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False
        )
    return tuple(out[0, len(prompt) :].tolist())


async def test_greedy_tokens_equal_transformers(fast_subject: Subject, public_subject: Subject, reference: Any) -> None:
    """Greedy tokens in float32 equal transformers' tokens, also for prompts longer than a prefill chunk or a block."""
    stops = reference.generation_config.eos_token_id
    banned = dict.fromkeys(stops if isinstance(stops, list) else [stops], -100.0)
    for subject in (fast_subject, public_subject):
        prompts = [subject.prompt(60 + i, tokens=length) for i, length in enumerate((1, 7, 40, 300))]
        answers = await Driver(subject).run(*(request(p, max_tokens=24, logit_bias=banned) for p in prompts))
        for prompt, answer in zip(prompts, answers, strict=True):
            assert answer.token_ids == _greedy(reference, prompt, 24)


async def test_packed_prompts_are_answered_like_lists(fast_subject: Subject, public_subject: Subject) -> None:
    """A long prompt gets the same answer in an array as in a list. The fast path sends an array to the engine core in
    packed form."""
    assert fast_subject.engine._path._takes_packed  # type: ignore[attr-defined]
    for subject in (fast_subject, public_subject):
        ids = list(subject.prompt(66, tokens=MIN_IDS + 90))
        answers = await Driver(subject).run(*(request(given, max_tokens=12) for given in (ids, array("I", ids))))
        assert answers[0].token_ids == answers[1].token_ids
        assert len(answers[0].token_ids) == 12


def _positions(answer: Answer) -> list[tuple[list[int], list[float]]]:
    return [
        (list(p.token_ids), [round(value, 4) for value in p.logprobs])
        for output in answer.outputs
        for p in output.logprobs or ()
    ]


async def test_both_paths_give_the_same_outputs(fast_subject: Subject, public_subject: Subject) -> None:
    """The fast path and AsyncLLM give equal tokens, finish reasons, stop tokens and log probabilities, for many kinds
    of requests."""
    requests: list[dict[str, object]] = [
        {"max_tokens": 9, "logprobs": 0},
        {"max_tokens": 9, "logprobs": 5},
        {"max_tokens": 9, "temperature": 0.8, "seed": 7, "logprobs": 2},
        {"max_tokens": 12, "temperature": 1.0, "seed": 1, "top_p": 0.7, "top_k": 20, "min_p": 0.01},
        {"max_tokens": 12, "frequency_penalty": 1.5, "presence_penalty": 0.5, "repetition_penalty": 1.2},
        {"max_tokens": 12, "logit_bias": {310: 50.0, 311: -100.0}},
        {"max_tokens": 12, "ignore_eos": False},
        {"max_tokens": 30, "grammar": Grammar("regex", "(ab|cd)+"), "ignore_eos": False},
    ]
    for number, changes in enumerate(requests):
        seen = []
        for subject in (fast_subject, public_subject):
            (answer,) = await Driver(subject).run(request(subject.prompt(70 + number), **changes))  # type: ignore[arg-type]
            seen.append((answer.token_ids, answer.finish, answer.outputs[-1].stop_token_id, _positions(answer)))
        assert seen[0] == seen[1], changes


async def test_logprobs_are_the_models_own(fast_subject: Subject, reference: Any) -> None:
    """Each position has the sampled token, then the k most likely tokens, with transformers' log probabilities."""
    import torch

    prompt = fast_subject.prompt(80)
    (answer,) = await Driver(fast_subject).run(request(prompt, max_tokens=4, logprobs=3))
    tokens = [*prompt, *answer.token_ids]
    with torch.no_grad():
        scores = reference(torch.tensor([tokens])).logits[0].log_softmax(-1)
    positions = [p for output in answer.outputs for p in output.logprobs or ()]
    for i, position in enumerate(positions):
        row = scores[len(prompt) - 1 + i]
        top = row.topk(3)
        assert list(position.token_ids) == [answer.token_ids[i], *top.indices.tolist()]
        assert position.logprobs == pytest.approx([row[answer.token_ids[i]].item(), *top.values.tolist()], abs=1e-4)


async def test_a_seed_repeats_with_a_chunked_prefill(fast_subject: Subject) -> None:
    """A seeded request gives the same tokens whether its prompt is prefilled in three chunks or comes from the cache.

    Without the seed repair, vLLM ends its engine core on the first of these requests.
    """
    prompt = fast_subject.prompt(81, tokens=300)
    driver = Driver(fast_subject)
    seen = []
    for salt in ("seed-a", "seed-a", "seed-b"):
        (answer,) = await driver.run(request(prompt, max_tokens=10, temperature=1.0, seed=11, cache_salt=salt))
        seen.append(answer.token_ids)
    assert seen[0] == seen[1] == seen[2]
    (other,) = await driver.run(request(prompt, max_tokens=10, temperature=1.0, seed=12))
    assert other.token_ids != seen[0]


async def test_json_schema_holds(fast_subject: Subject, llama_folder: Path) -> None:
    """The output of a request with a JSON schema is valid JSON that follows the schema."""
    import json

    from transformers import AutoTokenizer

    schema = {
        "type": "object",
        "properties": {"a": {"type": "integer", "minimum": 0, "maximum": 9}, "b": {"enum": ["x", "y"]}},
        "required": ["a", "b"],
        "additionalProperties": False,
    }
    (answer,) = await Driver(fast_subject).run(
        request(
            fast_subject.prompt(82),
            max_tokens=200,
            temperature=1.0,
            seed=5,
            grammar=Grammar("json_schema", json.dumps(schema)),
            ignore_eos=False,
        )
    )
    text = AutoTokenizer.from_pretrained(llama_folder).decode(answer.token_ids, skip_special_tokens=True)
    value = json.loads(text)
    assert set(value) == {"a", "b"}
    assert value["b"] in ("x", "y")


async def test_load_tells_what_runs_and_waits(fast_subject: Subject) -> None:
    """After the submits and during the run, load() counts the running and the waiting requests. Both counts are zero at
    the end."""
    driver = Driver(fast_subject)
    ids = [await driver.submit(request(fast_subject.prompt(84 + i), max_tokens=30)) for i in range(10)]
    load = fast_subject.engine.load()
    assert load.running + load.waiting == 10
    assert load.busy == "prefill"
    await driver.until(lambda: sum(bool(driver.answers[i].outputs) for i in ids) == 8)
    load = fast_subject.engine.load()
    assert (load.running, load.waiting) == (8, 2)
    assert load.kv_usage > 0
    await driver.until(lambda: all(driver.answers[i].finish is not None for i in ids))
    load = fast_subject.engine.load()
    assert (load.running, load.waiting, load.busy) == (0, 0, "")
    assert load.step_s > 0
