"""The output parser of a model, made from its catalog entry, its folder and its tokenizer bundle."""

from __future__ import annotations

import functools
from dataclasses import replace
from pathlib import Path

from cluster.api.types import EngineInfo, ModelSpec
from cluster.config.engine import PARSER_KEYS
from cluster.wire.bundle import Bundle
from cluster.worker.parsing.families import chosen_parsers
from cluster.worker.parsing.kit import KitSettings, usable_parsers
from cluster.worker.parsing.output_parser import OutputParser
from cluster.worker.parsing.parser_process import start_process
from cluster.worker.parsing.port import ParserNames


def model_parser(spec: ModelSpec, folder: Path, bundle: Bundle) -> OutputParser | None:
    """Return the output parser of a model for vLLM; None if it has no parsers. Blocks, and imports vLLM's parsers.

    A family's parser that cannot be used with the model's tokenizer is left out. Raises ValueError if a parser that the
    entry names cannot be used.
    """
    names, given = chosen_parsers(bundle, spec.engine)
    if not names:
        return None
    kit = _settings(spec, folder, names)
    return _parser(replace(kit, names=usable_parsers(kit, given)))


def requested_parser(spec: ModelSpec, folder: Path, bundle: Bundle) -> OutputParser | None:
    """Return an output parser with the parsers that the entry names, for a simulated engine; None without any.

    The family decides nothing here: the parsers need vLLM, which a machine with simulated engines may lack.
    """
    names, given = chosen_parsers(bundle, spec.engine)
    own = ParserNames(*(name if key in given else "" for key, name in zip(PARSER_KEYS, names.values, strict=True)))
    return _parser(_settings(spec, folder, own))


def _settings(spec: ModelSpec, folder: Path, names: ParserNames) -> KitSettings:
    return KitSettings(
        str(folder), names, spec.trust_remote_code, str(spec.engine.get("reasoning_parser_plugin") or "")
    )


def _parser(settings: KitSettings) -> OutputParser | None:
    return OutputParser(settings.names, functools.partial(start_process, settings)) if settings.names else None


def with_parsers(info: EngineInfo, parser: OutputParser | None) -> EngineInfo:
    """Return an engine's properties with the capabilities of the worker's parsers."""
    words = () if parser is None else parser.names.capabilities
    return replace(info, capabilities=(*info.capabilities, *words))
