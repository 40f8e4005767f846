"""A prompt gets the token ids that transformers gives and that vLLM's server would send to the engine."""

from __future__ import annotations

import asyncio
import subprocess
import sys

import pytest
from hypothesis import HealthCheck, given, settings

from cluster.api.outcomes import CallError, Outcome
from cluster.gateway.text.encoding.text_jobs import ENCODE_OFFLOAD_CHARS
from cluster.gateway.text.tokenizer import TextModel
from cluster.wire.bundle import Bundle
from tests.gateway.text.kinds import TEXTS, Kind
from tests.support.checkpoints import VOCAB_SIZES, big_tokenizer

pytestmark = pytest.mark.slow

LAW = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@LAW
@given(text=TEXTS)
def test_prompt_ids_equal_transformers(kind: Kind, text: str) -> None:
    """The token ids of a plain prompt, BOS included, equal the ids that transformers returns."""
    assert kind.ours.codec.encode_prompt(text) == kind.theirs(text, add_special_tokens=True)["input_ids"]


def test_what_a_model_is(kinds: dict[str, Kind]) -> None:
    """The vocabulary size, the family and the end tokens of a TextModel are those in the model's files."""
    llama, falcon = kinds["llama"].ours, kinds["falcon"].ours
    assert llama.vocab_size == VOCAB_SIZES["llama"]
    assert llama.family == "llama"
    assert falcon.family == "falcon"
    assert [llama.token_text(i) for i in llama.eos_token_ids] == ["<|eot_id|>", "<|end_of_text|>"]
    assert [falcon.token_text(i) for i in falcon.eos_token_ids] == ["<|endoftext|>"]
    assert llama.has_chat_template


async def test_long_texts_leave_the_loop_free(kinds: dict[str, Kind]) -> None:
    """While a long prompt is tokenized, the event loop keeps running other tasks. The token ids are the same as those
    from tokenizing in the event loop."""
    model = kinds["llama"].ours
    text = " ".join(f"river{i} turns wheel{i * 7919}" for i in range(40 * ENCODE_OFFLOAD_CHARS // 27))  # no two alike
    turns = 0
    task = asyncio.ensure_future(model.prompt_ids_async("t", text))
    while not task.done():
        turns += 1
        await asyncio.sleep(0)
    assert turns > 10
    assert list(task.result()) == model.codec.encode_prompt(text)
    messages = [{"role": "user", "content": text}]
    assert list(await model.chat_ids_async("t", messages)) == model.codec.encode_chat(messages)


async def test_short_texts_stay_on_the_loop(kinds: dict[str, Kind]) -> None:
    """A short prompt is tokenized at once, before the event loop runs anything else."""
    model = kinds["mistral"].ours
    with pytest.raises(StopIteration) as done:
        model.prompt_ids_async("t", "short").send(None)
    assert list(done.value.value) == model.codec.encode_prompt("short")


def test_a_lone_surrogate_is_refused(kinds: dict[str, Kind]) -> None:
    """A prompt with a lone surrogate gets an error that names the field."""
    with pytest.raises(CallError) as error:
        kinds["llama"].ours.codec.encode_prompt("a\ud800b")
    assert error.value.outcome is Outcome.INVALID_FIELD
    assert error.value.violations[0].field == "prompt"


@pytest.mark.parametrize("files", [{}, {"tokenizer.json": b"{"}, {"tokenizer.json": b"{}", "config.json": b"[]"}])
def test_a_broken_bundle_is_named(files: dict[str, bytes]) -> None:
    """A bundle without a usable tokenizer is refused with an error that names the file."""
    with pytest.raises(ValueError, match=r"tokenizer\.json"):
        TextModel.from_bundle(Bundle(files))


def test_needs_no_engine_library() -> None:
    """The modules of the text layer do not import transformers, torch, vllm or ray."""
    code = (
        "import sys; import cluster.gateway.text.tokenizer, cluster.gateway.text.logprobs\n"
        "assert not {'transformers', 'torch', 'vllm', 'ray'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)


@pytest.mark.slow
def test_a_big_vocabulary_loads_without_training(tmp_path_factory: pytest.TempPathFactory) -> None:
    """The generated tokenizer of 128,000 tokens encodes and decodes a text. It has the same special tokens as the
    models of its family."""
    from cluster.worker.weights.tokenizer_bundle import build_bundle

    folder = big_tokenizer(tmp_path_factory.mktemp("big"))
    model = TextModel.from_bundle(build_bundle(folder))
    ids = model.codec.encode_prompt("hello wörld")
    assert model.vocab_size == 128_000
    assert max(ids) == ids[0] == 128_000 - 8
    assert model.decode(ids) == "hello wörld"
