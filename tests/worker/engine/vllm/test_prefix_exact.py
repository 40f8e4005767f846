"""Tests of the check that decides, from vLLM's configuration, whether the cache hits of a model can be predicted
exactly."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from cluster.api.types import KV_EVENTS, PREFIX_EXACT
from cluster.worker.engine.vllm.kv_events import capabilities


def config(layers: list[str] | None = None, window: int | None = None, **model: Any) -> SimpleNamespace:
    """Return the part of a VllmConfig that the check reads. `model`: fields of its model_config."""
    fields = {
        "hf_text_config": SimpleNamespace(layer_types=layers),
        "get_sliding_window": lambda: window,
        "is_hybrid": False,
        "is_attention_free": False,
        "is_encoder_decoder": False,
        "use_mla": False,
        "attention_chunk_size": None,
    }
    others = {name: model.pop(name, None) for name in ("speculative_config", "kv_transfer_config")}
    return SimpleNamespace(model_config=SimpleNamespace(**(fields | model)), **others)


@pytest.mark.parametrize(
    ("given", "is_exact"),
    [
        (config(), True),
        (config(["full_attention"] * 2, window=4096), True),  # the window is configured, and no layer uses it
        (config(window=4096), False),
        (config(["full_attention", "sliding_window"]), False),
        (config(["full_attention", "linear_attention"]), False),
        (config(is_hybrid=True), False),
        (config(is_attention_free=True), False),
        (config(is_encoder_decoder=True), False),
        (config(use_mla=True), False),
        (config(attention_chunk_size=8192), False),
        (config(speculative_config=object()), False),
        (config(kv_transfer_config=object()), False),
    ],
)
def test_predictions_are_exact_for_full_attention_alone(given: Any, is_exact: bool) -> None:
    """An engine reports the capability `prefix:exact` only if all its layers have full attention and no setting makes
    it drop blocks."""
    assert capabilities(given) == ((KV_EVENTS, PREFIX_EXACT) if is_exact else (KV_EVENTS,))
