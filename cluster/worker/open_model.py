"""Opening of a model, from its catalog entry: its folder on this node's disk, its tokenizer bundle and its engine.

Replicas and the controller use this module.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from cluster.config.engine import code_arguments
from cluster.policy.catalog.placement import is_simulated
from cluster.wire.bundle import Bundle
from cluster.worker.parsing.model_parser import (
    model_parser,
    model_renderer,
    renderer_in,
    requested_parser,
    requested_renderer,
)
from cluster.worker.rendering.families import tokenizer_mode_of
from cluster.worker.replica import OpenedModel
from cluster.worker.settings import ReplicaSettings
from cluster.worker.weights.model_card import Card, read_card

if TYPE_CHECKING:
    from cluster.worker.adapters.port import AdapterFiles
    from cluster.worker.weights.fetching import Progress
    from cluster.worker.weights.sources import SourceRules

VLLM_MAX_LORA_RANK = 16
"""vLLM's default for max_lora_rank, which applies if the catalog entry sets none."""


def open_model(settings: ReplicaSettings, progress: Progress | None = None) -> OpenedModel:
    """Find or fetch the model, build its tokenizer bundle, and create its engine without starting it.

    Blocks. Raises ValueError. `progress`: called during a download with the number of bytes fetched so far, the total
    number of bytes, and the file's name.
    """
    if is_simulated(settings.spec):
        return _open_simulated(settings)
    _refuse_code(settings)
    from cluster.worker.engine.vllm.engine import VllmEngine
    from cluster.worker.weights.checkpoint import check_weights
    from cluster.worker.weights.digests import weight_digest

    folder = _resolve(settings, progress)
    check_weights(settings.spec, folder)
    bundle = _bundle_of(folder, settings)
    parser = model_parser(settings.spec, folder, bundle)
    renderer = model_renderer(settings.spec, folder, bundle)
    engine = VllmEngine(
        settings.spec,
        folder,
        reasoning_parser=parser.names.reasoning if parser else "",
        tokenizer_mode=tokenizer_mode_of(renderer_in(bundle)),
    )
    files = _adapter_store(settings, folder)
    return OpenedModel(
        engine,
        bundle,
        weight_digest(folder, _cache_dir(settings)),
        parser,
        renderer,
        engine,
        engine,
        files,
        engine.counts,
    )


def _refuse_code(settings: ReplicaSettings) -> None:
    """Raise ValueError if the engine arguments name code to load and the settings do not allow remote code."""
    if settings.allow_remote_code:
        return
    for path, text in code_arguments(settings.spec.engine):
        raise ValueError(f"models[{settings.spec.name}].engine.{path}: {text}")


def open_bundle(settings: ReplicaSettings) -> tuple[Bundle, Card]:
    """Return the model's tokenizer bundle and its model card. No engine is created. Blocks. Raises ValueError."""
    if is_simulated(settings.spec):
        return _open_simulated(settings).bundle, Card()
    folder = _resolve(settings)
    return _bundle_of(folder, settings), read_card(folder)


def _open_simulated(settings: ReplicaSettings) -> OpenedModel:
    from cluster.worker.engine.simulated.engine import SimConfig, SimEngine

    config = SimConfig.from_source(settings.spec.source, settings.spec.engine)
    bundle = _bundle_of(Path(config.folder), settings) if config.folder else Bundle({})
    engine = SimEngine(config)
    parser = requested_parser(settings.spec, Path(config.folder), bundle)
    renderer = requested_renderer(settings.spec, Path(config.folder), bundle)
    files = _adapter_store(settings, None)
    return OpenedModel(engine, bundle, config.weight_digest, parser, renderer, engine, engine, files, engine.counts)


def _adapter_store(settings: ReplicaSettings, base: Path | None) -> AdapterFiles | None:
    """Return the store of adapters; None if the catalog entry does not enable adapters.

    `base`: the base model's folder; None for a simulated engine.
    """
    engine = settings.spec.engine
    if not engine.get("enable_lora"):
        return None
    from cluster.worker.weights.adapter_store import AdapterStore

    max_rank = engine.get("max_lora_rank")
    return AdapterStore(_source_rules(settings), base, max_rank if isinstance(max_rank, int) else VLLM_MAX_LORA_RANK)


def _bundle_of(folder: Path, settings: ReplicaSettings) -> Bundle:
    from cluster.worker.weights.tokenizer_bundle import build_bundle

    spec = settings.spec
    return build_bundle(
        folder,
        trust_remote_code=spec.trust_remote_code,
        escapes_control_tokens=spec.control_tokens_in_content == "escape",
        tokenizer_mode=str(spec.engine.get("tokenizer_mode") or "auto"),
    )


def _resolve(settings: ReplicaSettings, progress: Progress | None = None) -> Path:
    from cluster.worker.weights.model_fields import check_fields
    from cluster.worker.weights.sources import resolve

    folder = resolve(settings.spec, _source_rules(settings), progress)
    try:
        check_fields(folder)
    except ValueError as error:
        raise ValueError(f"models[{settings.spec.name}].source: {error}") from None
    return folder


def _source_rules(settings: ReplicaSettings) -> SourceRules:
    from cluster.worker.weights.sources import SourceRules

    return SourceRules(
        cache_dir=_cache_dir(settings),
        hub_endpoint=settings.hugging_face_endpoint,
        hub_token_file=Path(settings.hugging_face_token_file) if settings.hugging_face_token_file else None,
        allowed_sources=settings.allowed_sources,
        allowed_formats=settings.allowed_formats,
        allow_remote_code=settings.allow_remote_code,
        allowed_licenses=settings.allowed_licenses,
    )


def _cache_dir(settings: ReplicaSettings) -> Path:
    """Return the configured cache folder, or the user's own cache folder on this node if none is configured."""
    from cluster.config.paths import cache_dir

    return Path(settings.cache_dir) if settings.cache_dir else cache_dir()
