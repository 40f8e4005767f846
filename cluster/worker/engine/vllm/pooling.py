"""Pooling models on vLLM: what they compute, which pooling requests they accept, and their vectors as bytes.

vLLM decides from the checkpoint's architecture, or from the arguments `runner` and `convert` of the entry, whether a
model is a pooling model. Such a model computes one vector for each request and generates no tokens.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from cluster.api.outcomes import Outcome
from cluster.api.pooling import MAX_DIMENSIONS, PoolingInfo, PoolingOptions, PoolingTask
from cluster.api.ports import EngineRefused
from cluster.api.types import FinishReason, ModelSpec, TokenOutput
from cluster.worker.weights.sentence_modules import pooling_type

TASKS = {PoolingTask.EMBED: "embed", PoolingTask.SCORE: "classify"}
"""vLLM's names of the pooling tasks."""
STEPS_AHEAD = 4
"""Number of full steps whose tokens an engine without a KV cache accepts at once. More requests wait in the queues of
the gateways, where fair order applies."""
NOT_FINITE = "NaN or infinite numbers in the vector"
NO_VECTOR = "the engine returned no vector"


@dataclass(frozen=True, slots=True)
class PoolingBounds:
    """The pooling requests that a started engine accepts.

    `token_types`: whether the model needs token types, which mark the second text of a pair.
    """

    info: PoolingInfo
    token_types: bool = False


def pooling_bounds(config: Any, tasks: Sequence[str], name: str) -> PoolingBounds | None:
    """Return the bounds of a pooling model's requests; None for a model that generates tokens.

    `config`: vLLM's VllmConfig. `tasks`: the tasks that the engine core reports. `name`: the name of the catalog entry.
    Raises ValueError for a pooling model that computes neither vectors of texts nor scores of tokenized pairs, or whose
    vectors are too long.
    """
    model = config.model_config
    if model.runner_type != "pooling":
        return None
    known = [task for task, word in TASKS.items() if word in tasks]
    labels = int(getattr(model.hf_config, "num_labels", 0) or 0)
    if PoolingTask.SCORE in known and labels != 1:
        known.remove(PoolingTask.SCORE)
    if PoolingTask.SCORE in known and (reason := _why_no_pairs(model)):
        known.remove(PoolingTask.SCORE)
        if not known:
            raise ValueError(f"models[{name}]: {reason}")
    if not known:
        classes = f" for {labels} classes" if "classify" in tasks else ""
        raise ValueError(
            f"models[{name}]: this pooling model computes {', '.join(sorted(tasks)) or 'nothing'}{classes}; served are "
            "vectors of texts (embed) and the scores of cross-encoders with one label (classify). Choose another "
            "model, or set engine.convert: embed"
        )
    dimensions = int(model.embedding_size) if PoolingTask.EMBED in known else 1
    if not 1 <= dimensions <= MAX_DIMENSIONS:
        raise ValueError(f"models[{name}]: its vectors have {dimensions} numbers; served are 1 to {MAX_DIMENSIONS}")
    declared = model.matryoshka_dimensions or ()
    info = PoolingInfo(
        tasks=tuple(known),
        dimensions=dimensions,
        shorter_dimensions=tuple(sorted({int(length) for length in declared if 1 <= int(length) < dimensions})),
        any_shorter=bool(model.is_matryoshka) and not declared and PoolingTask.EMBED in known,
    )
    return PoolingBounds(info, PoolingTask.SCORE in known and _has_token_types(model))


def check_settings(spec: ModelSpec, model: Any, bounds: PoolingBounds) -> None:
    """Raise ValueError if vLLM would pool in another way than sentence-transformers.

    `model`: vLLM's ModelConfig. For a model without such settings, sentence-transformers takes the mean of all tokens,
    or the last token if the model generates text. vLLM may take another one, which the catalog entry must then choose.
    """
    chosen: Any = spec.engine.get("pooler_config")
    if PoolingTask.EMBED not in bounds.info.tasks or (
        chosen and ("seq_pooling_type" in chosen or "pooling_type" in chosen)
    ):
        return
    saved, used = pooling_type(Path(model.model)), str(model.pooler_config.seq_pooling_type)
    generates = str(model.architectures[0]).endswith("ForCausalLM")
    if used != (saved or ("LAST" if generates else "MEAN")):
        what = (
            f"its modules.json has the pooling {saved}" if saved else "it has no modules.json, which says how it pools"
        )
        raise ValueError(
            f"models[{spec.name}]: {what}, and vLLM would use {used}: choose one with engine.pooler_config: "
            "{seq_pooling_type: MEAN}, CLS or LAST"
        )


def longest_input(model: Any) -> int:
    """Return the number of tokens that an input may have.

    A model with a table of positions has no more than the rows of the table, whatever its other settings say: a longer
    input would end the engine. RoBERTa's positions begin after the padding index (vLLM: models/roberta.py).
    """
    hf, longest = model.hf_text_config, int(model.max_model_len)
    rows = getattr(hf, "max_position_embeddings", None)
    is_table = getattr(hf, "position_embedding_type", "absolute") == "absolute" and not getattr(
        hf, "rope_parameters", None
    )
    if not isinstance(rows, int) or rows < 1 or not is_table:
        return longest
    first = (hf.pad_token_id or 0) + 1 if _class_of(model).__module__.endswith(".roberta") else 0
    return min(longest, rows - first)


def _why_no_pairs(model: Any) -> str:
    """Return why the model does not read a query and a document as its tokenizer encodes a pair; "" if it does.

    Gateways encode pairs with the tokenizer. For some rerankers that are language models, vLLM's own scoring API makes
    one text of both instead (vLLM 0.32, entrypoints/pooling/scoring/io_processor.py). The scores of such a model would
    differ from those of vLLM.
    """
    if not model.use_sep_token:
        return (
            "this reranker reads query and document as one text without separators (use_sep_token: false), and served "
            "are cross-encoders that read pairs as their tokenizer encodes them. If the model was trained on such "
            "pairs, set engine.hf_overrides: {use_sep_token: true}; otherwise choose another model"
        )
    if getattr(_class_of(model), "supports_score_template", False):
        return (
            "this reranker joins query and document by a template of its own, and served are cross-encoders that read "
            "pairs as their tokenizer encodes them. Choose another model"
        )
    return ""


def _has_token_types(model: Any) -> bool:
    """Return whether vLLM's class of the model accepts token types.

    If the class does not, a request with token types would end the engine core.
    """
    if int(getattr(model.hf_config, "type_vocab_size", 0) or 0) < 2:
        return False
    return "token_type_ids" in inspect.signature(_class_of(model).forward).parameters


def _class_of(model: Any) -> Any:
    """Return vLLM's class of a model. `model`: vLLM's ModelConfig."""
    from vllm import ModelRegistry

    return ModelRegistry.resolve_model_cls(model.architectures, model)[0]


def kv_blocks(blocks: int, block_size: int, max_num_batched_tokens: int, max_model_len: int) -> int:
    """Return the number of KV blocks from which the gateways' credit is computed.

    A model without a KV cache (such as BERT) has a single block, in which no request would fit. For such a model,
    return as many blocks as STEPS_AHEAD steps can fill.
    """
    if blocks > 1 and blocks * block_size >= max_model_len:
        return blocks
    return -(-STEPS_AHEAD * max(max_num_batched_tokens, max_model_len) // block_size)


def check_task(pooling: PoolingOptions | None, bounds: PoolingBounds | None) -> None:
    """Raise EngineRefused for a task that the model does not serve.

    `pooling`: None for a request to generate tokens.
    """
    if pooling is None:
        if bounds is not None:
            raise _refused("model", f"it computes {_words(bounds)} and generates no text; name a model that generates")
        return
    if bounds is None:
        raise _refused("model", f"it generates text and does not compute {pooling.task.value}; name a pooling model")
    if pooling.task not in bounds.info.tasks:
        raise _refused("model", f"it computes {_words(bounds)}, not {pooling.task.value}; name another pooling model")


def _words(bounds: PoolingBounds) -> str:
    return " and ".join(task.value for task in bounds.info.tasks)


def _refused(field: str, description: str, outcome: Outcome = Outcome.UNSUPPORTED_FEATURE) -> EngineRefused:
    return EngineRefused(outcome.name, f"{field}: {description}", field)


def check_pooling(pooling: PoolingOptions, tokens: int, info: PoolingInfo) -> None:
    """Raise EngineRefused for parameters outside their ranges. `tokens`: length of the prompt in tokens."""
    if not 0 <= pooling.second_text_at < tokens:
        what = f"must be in [0, {tokens - 1}], got {pooling.second_text_at}"
        raise _refused("second_text_at", what, Outcome.INVALID_FIELD)
    length = pooling.dimensions
    if pooling.task is PoolingTask.SCORE:
        if length not in (None, 1):
            raise _refused("dimensions", "a score is one number; leave the field out", Outcome.INVALID_FIELD)
        return
    if length is None or length == info.dimensions or length in info.shorter_dimensions:
        return
    if info.any_shorter:
        if not 1 <= length <= info.dimensions:
            raise _refused("dimensions", f"must be in [1, {info.dimensions}], got {length}", Outcome.INVALID_FIELD)
        return
    lengths = ", ".join(map(str, (*info.shorter_dimensions, info.dimensions)))
    raise _refused(
        "dimensions", f"this model computes vectors of {lengths} numbers, got {length}", Outcome.INVALID_FIELD
    )


@lru_cache(maxsize=1)
def _params_class() -> Any:
    """Return a subclass of PoolingParams whose objects vLLM's input processor does not copy.

    The processor copies parameters because a caller may use them again. Here each request has its own parameters.
    """
    from msgspec.structs import astuple
    from vllm import PoolingParams

    class OwnParams(PoolingParams):  # type: ignore[misc, unused-ignore]
        def clone(self) -> OwnParams:
            return self

        def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
            return PoolingParams, astuple(self)  # pickle does not find a class of a function

    return OwnParams


def pooling_params(pooling: PoolingOptions, bounds: PoolingBounds) -> Any:
    """Return vLLM's PoolingParams of a checked request."""
    types = {"compressed_token_type_ids": pooling.second_text_at}
    is_whole = pooling.task is PoolingTask.SCORE or pooling.dimensions == bounds.info.dimensions
    return _params_class()(
        task=TASKS[pooling.task],
        dimensions=None if is_whole else pooling.dimensions,
        extra_kwargs=types if bounds.token_types and pooling.second_text_at else None,
    )


def vector_of(tensor: Any) -> tuple[bytes, str]:
    """Return a pair: the vector as little-endian float32 bytes, and the reason why the result is invalid. One of the
    two is empty.

    `tensor`: vLLM's result, or None.
    """
    import numpy as np

    if tensor is None or not tensor.numel():
        return b"", NO_VECTOR
    values = tensor.detach().float().cpu().flatten().numpy()
    if not np.isfinite(values).all():
        return b"", NOT_FINITE
    return values.astype("<f4", copy=False).tobytes(), ""


def set_vector(output: TokenOutput, tensor: Any) -> None:
    """Set the vector of a pooling request's output. If the vector is missing or not finite, set an error instead."""
    vector, why = vector_of(tensor)
    if why:
        output.finish, output.message = FinishReason.ERROR, why
    else:
        output.vector = vector
