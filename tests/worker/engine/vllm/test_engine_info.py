"""The properties of an engine, derived from vLLM's real configuration. No engine is started."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cluster.api.adapters import ADAPTERS
from cluster.api.types import RESUME_PLAIN, weakest_resume_capability
from cluster.worker.engine.vllm import arguments, repairs
from cluster.worker.engine.vllm.engine_info import EngineProperties, engine_properties
from tests.support.pooling_models import build_cross_encoder
from tests.worker.engine.conftest import tiny_spec

pytestmark = pytest.mark.engine

OWN_EOS = 7
"""The EOS id of the tokenizer."""


class FakePath:
    """A fake engine path with only the fields that the properties of an engine are derived from."""

    def __init__(self, tasks: tuple[str, ...]) -> None:
        self.tasks = tasks

    def eos_token_id(self) -> int | None:
        return OWN_EOS


def properties(
    folder: Path,
    *,
    tasks: tuple[str, ...] = ("generate",),
    blocks: int = 77,
    why_public: str = "",
    exact_resume: bool = True,
    has_event_socket: bool = False,
    **entry: Any,
) -> EngineProperties:
    """Return the properties of an engine. `folder`: the checkpoint. `blocks`: number of KV blocks. `why_public`: reason
    for the public path, "" for the fast path. `entry`: changed keys of the catalog entry."""
    spec = tiny_spec(**entry)
    config = arguments.engine_arguments(spec, folder, "mp").create_engine_config()
    repairs.apply()
    config.cache_config.num_gpu_blocks = blocks
    path: Any = FakePath(tasks)
    return engine_properties(
        spec,
        config,
        path,
        why_public=why_public,
        exact_resume=exact_resume,
        has_event_socket=has_event_socket,
    )


def test_a_generating_engine(llama_folder: Path) -> None:
    """EngineInfo of a generating model: the KV cache and batch sizes are those of its catalog entry, and the EOS ids
    are those of the checkpoint and of the tokenizer together."""
    found = properties(llama_folder)
    info, bounds = found.info, found.bounds
    assert (info.block_size, info.kv_blocks, info.max_num_seqs, info.max_num_batched_tokens) == (32, 77, 8, 128)
    assert (info.max_model_len, info.vocab_size) == (bounds.max_model_len, bounds.vocab_size) == (1024, 768)
    assert (info.engine_path, info.engine_path_reason) == ("fastpath", "")
    assert info.capabilities[:4] == ("chat", "complete", "logprobs", "response_format")
    assert weakest_resume_capability(info.capabilities) != RESUME_PLAIN
    assert OWN_EOS in bounds.eos_token_ids
    assert len(bounds.eos_token_ids) > 1
    assert bounds.installs
    assert bounds.pooling is None
    assert found.adapters.slots == info.adapter_slots == 0


def test_resume_as_a_prompt_is_reported(llama_folder: Path) -> None:
    """An engine on the public path (AsyncLLM) that cannot resume exactly has the capability RESUME_PLAIN. To resume a
    request, it treats the emitted tokens as a part of the prompt."""
    found = properties(llama_folder, exact_resume=False, why_public="switched off")
    assert (found.info.engine_path, found.info.engine_path_reason) == ("public", "switched off")
    assert RESUME_PLAIN in found.info.capabilities
    assert not found.bounds.installs
    assert not found.bounds.resumes_seeds


def test_kv_events_need_a_socket_and_a_prefix_cache(llama_folder: Path) -> None:
    """An engine reports the capabilities of KV events only if it has a socket for events and a prefix cache."""

    def capabilities(**entry: Any) -> set[str]:
        return set(properties(llama_folder, **entry).info.capabilities)

    assert capabilities(has_event_socket=True) > capabilities()
    without = {"engine": {"enable_prefix_caching": False, "block_size": 32}}
    assert capabilities(has_event_socket=True, **without) == capabilities(**without)


def test_adapters_are_reported(llama_folder: Path) -> None:
    """An engine with adapters reports the number of its adapter slots and the number of adapters that its memory can
    hold. The bounds by which requests are checked contain the engine's EngineAdapters object."""
    engine = {"enable_lora": True, "max_loras": 2, "max_cpu_loras": 4, "enable_prefix_caching": False}
    found = properties(llama_folder, engine=engine)
    assert (found.info.adapter_slots, found.info.adapter_capacity) == (2, 4)
    assert (found.adapters.slots, found.adapters.capacity) == (2, 4)
    assert ADAPTERS in found.info.capabilities
    assert found.bounds.adapters is found.adapters


@pytest.mark.thorough
def test_a_pooling_engine(tmp_path: Path) -> None:
    """A cross-encoder has none of the capabilities of generating models. It has no KV cache; its number of KV blocks is
    made up and only limits its queue."""
    found = properties(build_cross_encoder(tmp_path / "cross-encoder"), tasks=("classify",), blocks=1, max_model_len=96)
    assert found.info.capabilities == ("pools:score",)
    assert found.info.pooling is not None
    assert found.bounds.pooling is not None
    assert found.info.kv_blocks > 1
    assert found.info.default_sampling == {}
    assert found.adapters.slots == 0


def test_a_pooling_engine_without_a_served_task_is_refused(tmp_path: Path) -> None:
    """A pooling engine without a served task is refused with an error that names the entry."""
    with pytest.raises(ValueError, match=r"models\[tiny\]: this pooling model computes token_embed"):
        properties(build_cross_encoder(tmp_path / "cross-encoder"), tasks=("token_embed",), max_model_len=96)


def test_a_reranker_without_separators_is_refused(tmp_path: Path) -> None:
    """A reranker whose pairs vLLM joins to one text is refused, also if only the entry's hf_overrides say so."""
    folder = build_cross_encoder(tmp_path / "cross-encoder")
    with pytest.raises(ValueError, match=r"models\[tiny\]: this reranker reads query and document as one text"):
        properties(folder, tasks=("classify",), max_model_len=96, engine={"hf_overrides": {"use_sep_token": False}})
