"""The output parser and the renderer of a model, made from its catalog entry, its folder and its tokenizer bundle."""

from __future__ import annotations

import functools
import importlib.util
import json
from dataclasses import replace
from pathlib import Path

import structlog

from cluster.api.types import RENDERER as RENDERER_CAPABILITY
from cluster.api.types import EngineInfo, ModelSpec
from cluster.config.engine import PARSER_KEYS
from cluster.wire.bundle import RENDERER, Bundle
from cluster.worker.parsing.families import chosen_parsers
from cluster.worker.parsing.kit import KitSettings, usable_parsers
from cluster.worker.parsing.output_parser import OutputParser
from cluster.worker.parsing.parser_process import start_process
from cluster.worker.parsing.port import ParserNames
from cluster.worker.rendering.kit import load_renderer
from cluster.worker.rendering.prompt_renderer import PromptRenderer

log = structlog.get_logger("parser")


def model_parser(spec: ModelSpec, folder: Path, bundle: Bundle) -> OutputParser | None:
    """Return the output parser of a model on vLLM; None if the model has no parsers. Blocks, and imports vLLM's
    parsers.

    If a parser was chosen by the model's family and cannot be used with the model's tokenizer, it is left out. Raises
    ValueError if a parser that the catalog entry names cannot be used.
    """
    names, given = chosen_parsers(bundle, spec.engine)
    if not names:
        return None
    kit = _settings(spec, folder, names, renderer_in(bundle))
    return _parser(replace(kit, names=usable_parsers(kit, given)))


def model_renderer(spec: ModelSpec, folder: Path, bundle: Bundle) -> PromptRenderer | None:
    """Return the renderer of a model on vLLM; None if gateways must render the model's chat template. Blocks; imports
    vLLM.

    Gateways must render the template if the model has no renderer, or if the renderer cannot be loaded but a chat
    template exists. Raises ValueError if the renderer cannot be loaded and there is no chat template.
    """
    name = renderer_in(bundle)
    if not name:
        return None
    try:
        load_renderer(name, str(folder), trust_remote_code=spec.trust_remote_code).close()
    except ValueError as error:
        if "chat_template.jinja" not in bundle.files:
            raise
        log.warning("renderer.not_used", renderer=name, reason=str(error))
        return None
    return _renderer(spec, folder, name)


def requested_renderer(spec: ModelSpec, folder: Path, bundle: Bundle) -> PromptRenderer | None:
    """Return the renderer for a model on a simulated engine, if the catalog entry asks for one.

    Returns None if the entry asks for none, or if vLLM is missing.
    """
    name = renderer_in(bundle)
    named = "tokenizer_mode" in spec.engine and importlib.util.find_spec("vllm") is not None
    return _renderer(spec, folder, name) if name and named else None


def renderer_in(bundle: Bundle) -> str:
    """Return the name of the bundle's renderer; "" if gateways render the model's chat template."""
    return str(json.loads(bundle.files.get("tokenizer_config.json", b"{}")).get(RENDERER, ""))


def requested_parser(spec: ModelSpec, folder: Path, bundle: Bundle) -> OutputParser | None:
    """Return the output parser for a model on a simulated engine, with the parsers that the catalog entry names.

    Returns None if the entry names no parser. Parsers of the model's family are not used: they need vLLM, which a
    machine with simulated engines may lack.
    """
    names, given = chosen_parsers(bundle, spec.engine)
    own = ParserNames(*(name if key in given else "" for key, name in zip(PARSER_KEYS, names.values, strict=True)))
    return _parser(_settings(spec, folder, own, renderer_in(bundle)))


def _settings(spec: ModelSpec, folder: Path, names: ParserNames, renderer: str) -> KitSettings:
    plugin = str(spec.engine.get("reasoning_parser_plugin") or "")
    return KitSettings(str(folder), names, spec.trust_remote_code, plugin, renderer=renderer)


def _renderer(spec: ModelSpec, folder: Path, name: str) -> PromptRenderer:
    settings = KitSettings(str(folder), ParserNames(), spec.trust_remote_code, renderer=name)
    return PromptRenderer(name, functools.partial(start_process, settings))


def _parser(settings: KitSettings) -> OutputParser | None:
    return OutputParser(settings.names, functools.partial(start_process, settings)) if settings.names else None


def with_parsers(info: EngineInfo, parser: OutputParser | None, renderer: PromptRenderer | None = None) -> EngineInfo:
    """Return `info` with the capabilities of the worker's parsers and renderer added."""
    words = () if parser is None else parser.names.capabilities
    renders = () if renderer is None else (RENDERER_CAPABILITY + renderer.name,)
    return replace(info, capabilities=(*info.capabilities, *words, *renders))
