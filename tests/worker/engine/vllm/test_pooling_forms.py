"""Random models of sentence-transformers' forms on vLLM: their vectors and scores equal those of transformers.

vLLM's engine core runs inside this process, which takes seconds a model. Headrace's arguments, bounds and parameters
are those of a worker.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cluster.api.pooling import PoolingOptions, PoolingTask
from cluster.api.types import ModelSpec
from cluster.worker.engine.golden_vectors import floats, why_vector_wrong
from cluster.worker.engine.vllm.arguments import engine_arguments
from cluster.worker.engine.vllm.engine_info import EngineProperties, engine_properties
from cluster.worker.engine.vllm.pooling import pooling_params, vector_of
from cluster.worker.weights.sources import check_folder
from cluster.worker.weights.tokenizer_bundle import build_bundle
from tests.support.pooling_models import FORMS, MEAN, NORMALIZE, PoolingForm, build_form, reference

pytestmark = [pytest.mark.engine, pytest.mark.long]
TEXTS = ("", "The cat sleeps", "why RUNS the old river", "red green blue " * 15)
PAIRS = (("why runs", "the cat"), ("mountain", "old river sleeps"), ("a", "a " * 30))
NEAR = 1e-5
ENGINE = {"max_num_seqs": 8, "max_num_batched_tokens": 512, "kv_cache_memory_bytes": 32 << 20}


class Engine:
    """vLLM's engine of a model, inside this process."""

    def __init__(self, spec: ModelSpec, folder: Path) -> None:
        from vllm.v1.engine.llm_engine import LLMEngine

        self._engine = LLMEngine.from_engine_args(engine_arguments(spec, folder, "mp"), enable_multiprocessing=False)
        path: Any = SimpleNamespace(tasks=self._engine.get_supported_tasks())
        try:
            self.properties: EngineProperties = engine_properties(
                spec, self._engine.vllm_config, path, why_public="", exact_resume=False, has_event_socket=False
            )
        except ValueError:
            self.close()
            raise

    def run(self, inputs: Sequence[tuple[Sequence[int], int]]) -> list[bytes]:
        """Return the vectors of inputs, which are computed in one batch."""
        bounds = self.properties.bounds.pooling
        assert bounds is not None
        for at, (ids, second) in enumerate(inputs):
            options = PoolingOptions(bounds.info.tasks[0], second_text_at=second)
            self._engine.add_request(str(at), {"prompt_token_ids": list(ids)}, pooling_params(options, bounds))
        results: dict[str, bytes] = {}
        while len(results) < len(inputs):
            for output in self._engine.step():
                results[output.request_id], error = vector_of(output.outputs.data)
                assert not error
        return [results[str(at)] for at in range(len(inputs))]

    def close(self) -> None:
        """End the engine."""
        from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

        self._engine.engine_core.shutdown()
        del self._engine
        gc.collect()
        cleanup_dist_env_and_memory()


@contextmanager
def running(folder: Path, form: PoolingForm, **engine: object) -> Iterator[Engine]:
    """Run the engine of a folder that has passed the checks of a worker."""
    load_format = "auto" if form.pickled else "safetensors"
    spec = ModelSpec("m", "unused", dtype="float32", load_format=load_format, engine={**ENGINE, **engine})
    check_folder(spec, folder)
    made = Engine(spec, folder)
    try:
        yield made
    finally:
        made.close()


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let vLLM place its rank in this process."""
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")


def inputs_of(folder: Path, form: PoolingForm) -> list[tuple[list[int], int]]:
    """Return the token ids of the texts or pairs, encoded with the gateway's tokenizer."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_str(build_bundle(folder).files["tokenizer.json"].decode())
    if not form.activation:
        return [(tokenizer.encode(text).ids, 0) for text in TEXTS]
    encoded = [tokenizer.encode(*pair) for pair in PAIRS]
    return [(each.ids, each.type_ids.index(1)) for each in encoded]


@pytest.mark.parametrize("form", [form for form in FORMS if not form.refusal], ids=lambda form: form.name)
def test_results_equal_the_reference(tmp_path: Path, form: PoolingForm) -> None:
    """The vectors and scores of each served form equal those that its modules compute in torch, to 1e-5. The longest
    input that a gateway accepts is computed too, and vectors have the length that the gateways see."""
    folder = build_form(tmp_path, form)
    inputs = inputs_of(folder, form)
    with running(folder, form) as engine:
        info = engine.properties.info
        assert info.pooling is not None
        assert info.pooling.tasks == ((PoolingTask.SCORE if form.activation else PoolingTask.EMBED),)
        longest = [2, *(5 + at % 14 for at in range(info.max_model_len - 2)), 3]
        inputs.append((longest, 0))
        vectors = engine.run(inputs)
    assert [len(vector) for vector in vectors] == [4 * info.pooling.dimensions] * len(vectors)
    assert not why_vector_wrong(vectors[0], vectors[0], info)
    for got, expected in zip(vectors, reference(folder, form, inputs), strict=True):
        assert list(floats(got)) == pytest.approx(expected, abs=NEAR)


def test_a_model_without_settings_pools_as_its_entry_says(tmp_path: Path) -> None:
    """An encoder without files of sentence-transformers is refused, since vLLM would guess how to pool. With a pooling
    in the catalog entry it serves vectors of the norm 1."""
    form = PoolingForm("mean, normalized", [("Pooling", MEAN), NORMALIZE])
    folder = build_form(tmp_path, form)
    for file in ("modules.json", "config_sentence_transformers.json"):
        (folder / file).unlink()
    (folder / "1_Pooling").rename(tmp_path / "unused")
    with pytest.raises(ValueError, match=r"models\[m\]: it has no modules\.json"), running(folder, form):
        pass
    inputs = inputs_of(folder, form)
    with running(folder, form, pooler_config={"seq_pooling_type": "MEAN"}) as engine:
        vectors = engine.run(inputs)
    for got, expected in zip(vectors, reference(folder, form, inputs), strict=True):
        assert list(floats(got)) == pytest.approx(expected, abs=NEAR)
