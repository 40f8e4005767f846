"""Bounds of pooling models: refusals at start, the capacity, and results that are not valid vectors."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.api.pooling import MAX_DIMENSIONS, PoolingInfo, PoolingOptions, PoolingTask
from cluster.api.ports import EngineRefused
from cluster.api.types import FinishReason, ModelSpec, TokenOutput
from cluster.worker.engine.golden_vectors import floats
from cluster.worker.engine.vllm.pooling import (
    NO_VECTOR,
    NOT_FINITE,
    STEPS_AHEAD,
    PoolingBounds,
    check_pooling,
    check_settings,
    kv_blocks,
    longest_input,
    pooling_bounds,
    set_vector,
)
from tests.support.pooling_models import PoolingForm, build_form

pytestmark = pytest.mark.engine


def config(**changes: Any) -> Any:
    """Return the part of vLLM's configuration that pooling_bounds reads."""
    hf = SimpleNamespace(num_labels=changes.pop("num_labels", 2), type_vocab_size=0)
    fields = {
        "runner_type": "pooling",
        "hf_config": hf,
        "embedding_size": 8,
        "is_matryoshka": False,
        "matryoshka_dimensions": None,
        "use_sep_token": True,
        "architectures": ["BertForSequenceClassification"],
        "model_impl": "vllm",
    }
    return SimpleNamespace(model_config=SimpleNamespace(**(fields | changes)))


def test_a_generating_model_has_no_bounds() -> None:
    """`pooling_bounds` returns None for a model that generates tokens, even if pooling tasks are passed."""
    assert pooling_bounds(config(runner_type="generate"), ("embed",), "m") is None


@pytest.mark.parametrize(
    ("tasks", "labels", "says"),
    [
        (("token_embed",), 2, "computes token_embed;"),
        (("classify",), 3, "computes classify for 3 classes"),
        ((), 2, "computes nothing"),
    ],
)
def test_a_model_without_a_served_task_is_refused(tasks: tuple[str, ...], labels: int, says: str) -> None:
    """A pooling model that computes neither vectors of texts nor scores does not start. The error names the entry and
    the remedy."""
    with pytest.raises(ValueError, match=r"models\[m\]") as error:
        pooling_bounds(config(num_labels=labels), tasks, "m")
    assert says in str(error.value)
    assert "choose another model" in str(error.value).lower()


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"use_sep_token": False}, r"as one text without separators .*set engine\.hf_overrides: {use_sep_token: true}"),
        ({"architectures": ["JinaVLForRanking"]}, "by a template of its own.*Choose another model"),
    ],
    ids=["no separator", "template"],
)
def test_rerankers_that_read_no_tokenized_pairs_are_refused(changes: dict[str, Any], says: str) -> None:
    """A reranker for which vLLM makes one text of query and document does not start, since gateways encode both as a
    pair. If the model also computes vectors, it serves only those."""
    with pytest.raises(ValueError, match=rf"models\[m\]: this reranker .*{says}"):
        pooling_bounds(config(num_labels=1, **changes), ("classify",), "m")
    bounds = pooling_bounds(config(num_labels=1, **changes), ("classify", "embed"), "m")
    assert bounds is not None
    assert bounds.info.tasks == (PoolingTask.EMBED,)


@pytest.mark.parametrize("size", [0, MAX_DIMENSIONS + 1])
def test_vectors_of_impossible_lengths_are_refused(size: int) -> None:
    """A model does not start if its vectors have a length that a gateway would refuse."""
    with pytest.raises(ValueError, match=f"have {size} numbers"):
        pooling_bounds(config(embedding_size=size), ("embed",), "m")


@pytest.mark.parametrize(
    ("architecture", "used", "pooler", "says"),
    [
        ("BertModel", "CLS", None, "it has no modules.json, which says how it pools, and vLLM would use CLS"),
        ("BertModel", "MEAN", None, ""),
        ("BertModel", "CLS", {"seq_pooling_type": "CLS"}, ""),
        ("Qwen3ForCausalLM", "LAST", None, ""),
        ("Qwen3ForCausalLM", "MEAN", None, "and vLLM would use MEAN"),
    ],
)
def test_a_guessed_pooling_is_refused(
    tmp_path: Path, architecture: str, used: str, pooler: dict[str, str] | None, says: str
) -> None:
    """A model without modules.json serves if vLLM pools as sentence-transformers would, or as the catalog entry says.
    If a model has modules.json, vLLM must have read the same pooling from it."""
    spec = ModelSpec("m", "unused", engine={"pooler_config": pooler} if pooler else {})
    bounds = PoolingBounds(PoolingInfo((PoolingTask.EMBED,), 8))
    model = SimpleNamespace(
        model=str(tmp_path), architectures=[architecture], pooler_config=SimpleNamespace(seq_pooling_type=used)
    )
    if says:
        with pytest.raises(ValueError, match=rf"models\[m\]: .*{says}: choose one with engine\.pooler_config"):
            check_settings(spec, model, bounds)
    else:
        check_settings(spec, model, bounds)
    build_form(tmp_path, PoolingForm("mean"), weights=False)
    if used == "MEAN" or pooler:
        check_settings(spec, model, bounds)
    else:
        with pytest.raises(ValueError, match=f"its modules.json has the pooling MEAN, and vLLM would use {used}"):
            check_settings(spec, model, bounds)


@pytest.mark.parametrize(
    ("architecture", "changes", "longest"),
    [
        ("BertModel", {}, 96),
        ("XLMRobertaModel", {}, 94),
        ("RobertaForSequenceClassification", {"pad_token_id": 0}, 95),
        ("ModernBertModel", {"rope_parameters": {"rope_theta": 1e4}}, 400),
        ("XLMRobertaModel", {"position_embedding_type": "rotary"}, 400),
        ("BertModel", {"max_position_embeddings": None}, 400),
    ],
)
def test_an_input_is_no_longer_than_the_table_of_positions(
    architecture: str, changes: dict[str, Any], longest: int
) -> None:
    """A model with a table of positions accepts no longer input than the table has rows, whatever `max_seq_length`
    says. RoBERTa's positions begin after its padding index."""
    hf = SimpleNamespace(**({"max_position_embeddings": 96, "pad_token_id": 1} | changes))
    assert (
        longest_input(config(hf_text_config=hf, max_model_len=400, architectures=[architecture]).model_config)
        == longest
    )


def test_declared_lengths() -> None:
    """An embedding model can shorten its vectors to the lengths in its configuration; the lengths are sorted, and
    impossible lengths are dropped. A classifier computes scores only if it has one label."""

    def info(tasks: tuple[str, ...], **changes: Any) -> PoolingInfo:
        bounds = pooling_bounds(config(**changes), tasks, "m")
        assert bounds is not None
        return bounds.info

    embed = (PoolingTask.EMBED,)
    assert info(("embed", "token_embed")) == PoolingInfo(embed, 8)
    declared = {"is_matryoshka": True, "matryoshka_dimensions": [8, 4, 2, 0, 16, 4]}
    assert info(("embed",), **declared) == PoolingInfo(embed, 8, (2, 4))
    assert info(("embed",), is_matryoshka=True) == PoolingInfo(embed, 8, any_shorter=True)
    assert info(("classify",), num_labels=1) == PoolingInfo((PoolingTask.SCORE,), 1)
    assert info(("embed", "classify"), num_labels=3) == PoolingInfo(embed, 8)


@given(st.integers(0, 9), st.integers(1, 256), st.integers(1, 9999), st.integers(1, 9999))
def test_credit_suffices_for_a_text_and_a_step(blocks: int, block_size: int, step: int, longest: int) -> None:
    """The advertised capacity is large enough for the longest text, whatever vLLM reports. Without a KV cache, it is
    large enough for STEPS_AHEAD steps."""
    stated = kv_blocks(blocks, block_size, step, longest) * block_size
    assert stated >= longest
    if blocks < 2:
        assert STEPS_AHEAD * max(step, longest) <= stated < STEPS_AHEAD * max(step, longest) + block_size
    elif blocks * block_size >= longest:
        assert stated == blocks * block_size


@given(st.integers(-3, 12), st.sets(st.integers(1, 7)), st.booleans())
def test_lengths_are_refused_exactly_outside_the_declared_ones(
    length: int, shorter: set[int], any_shorter: bool
) -> None:
    """A request may ask for vectors of the model's own length, or of a shorter length that the model declares.

    If the model declares that any shorter length is allowed, the request may ask for any shorter length. All other
    lengths are refused.
    """
    info = PoolingInfo((PoolingTask.EMBED,), 8, tuple(sorted(shorter)), any_shorter)
    params = PoolingOptions(PoolingTask.EMBED, length)
    if length == 8 or length in shorter or (any_shorter and 1 <= length <= 8):
        check_pooling(params, 1, info)
    else:
        with pytest.raises(EngineRefused, match=r"dimensions: .*\b8\b") as refused:
            check_pooling(params, 1, info)
        assert refused.value.field == "dimensions"


def test_a_score_has_one_number() -> None:
    """A score may be requested with length 1 or without a length, even if the model also computes vectors."""
    info = PoolingInfo((PoolingTask.EMBED, PoolingTask.SCORE), 8, (4,))
    for length in (None, 1):
        check_pooling(PoolingOptions(PoolingTask.SCORE, length), 1, info)
    for length in (0, 2, 4, 8):
        with pytest.raises(EngineRefused, match="dimensions: a score is one number"):
            check_pooling(PoolingOptions(PoolingTask.SCORE, length), 1, info)


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
def test_numbers_that_are_not_finite_are_an_error(wrong: float) -> None:
    """If a vector has NaN or an infinite number, the request ends in an error."""
    import torch

    output = TokenOutput("r", (), FinishReason.STOP)
    set_vector(output, torch.tensor([0.5, wrong]))
    assert (output.finish, output.vector, output.message) == (FinishReason.ERROR, None, NOT_FINITE)


def test_a_missing_vector_is_an_error() -> None:
    """A pooling request without a result ends in an error. Half-precision numbers become float32."""
    import torch

    for missing in (None, torch.empty(0)):
        output = TokenOutput("r", (), FinishReason.STOP)
        set_vector(output, missing)
        assert (output.finish, output.vector, output.message) == (FinishReason.ERROR, None, NO_VECTOR)
    output = TokenOutput("r", (), FinishReason.STOP)
    set_vector(output, torch.tensor([[0.5, -2.0]], dtype=torch.bfloat16))
    assert output.vector is not None
    assert list(floats(output.vector)) == [0.5, -2.0]
