"""Storage of each model's last valid entry, which replaces an invalid entry when the controller starts."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import structlog

from cluster.api.outcomes import CallError
from cluster.config.document import entry_of, with_models
from cluster.config.lenient import HeldModel, PartialConfig
from cluster.config.schema import Config
from cluster.process.private_files import replace_file

log = structlog.get_logger("controller")
FILE = "last-good-models.json"


def with_last_good(found: PartialConfig, folder: Path) -> PartialConfig:
    """Replace each invalid model entry by the model's last valid entry. Store the valid entries for the next start.

    If a model has no last valid entry, the model is held: its replicas are left as they are. A model is also held
    if its last valid entry would make the whole configuration invalid.
    """
    path = folder / FILE
    before = _read(path)
    restored = _restored(found, before)
    if found.problems:
        log.error(
            "config.partly_refused",
            problems=found.problems[:10],
            restored=sorted(
                {model.name for model in restored.config.models} - {model.name for model in found.config.models}
            ),
            held="all running models" if restored.all_held else [model.name for model in restored.held],
        )
    entries = {model.name: entry_of(model) for model in restored.config.models}
    if restored.all_held:
        entries = dict(before) | entries
    entries |= {model.name: before[model.name] for model in restored.held if model.name in before}
    _write(path, entries)
    return restored


def _restored(found: PartialConfig, before: Mapping[str, Any]) -> PartialConfig:
    config, held = found.config, []
    if found.all_held:
        whole = _config_with(config, list(before.values()), ())
        return found if whole is None or not before else replace(found, config=whole, held=(), all_held=False)
    for model in found.held:
        names = {name for other in found.held if other is not model for name in (other.name, *other.aliases)}
        entries = [entry_of(valid) for valid in config.models]
        with_model = _config_with(config, [*entries, before[model.name]], names) if model.name in before else None
        if with_model is None:
            held.append(model)
        else:
            config = with_model
    return replace(found, config=config, held=tuple(held))


def _config_with(
    config: Config, entries: Sequence[Mapping[str, Any]], absent: set[str] | tuple[str, ...]
) -> Config | None:
    """Return `config` with the models in `entries`, or None if the result is invalid.

    `absent`: names of models that have no entry. Fallbacks may name these models.
    """
    try:
        return with_models(config, entries, absent)
    except CallError:
        return None


def _read(path: Path) -> Mapping[str, Any]:
    try:
        values = json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        log.warning("config.last_good_not_read", path=str(path), reason=str(error))
        return {}
    return (
        {name: entry for name, entry in values.items() if isinstance(entry, dict)} if isinstance(values, dict) else {}
    )


def _write(path: Path, entries: Mapping[str, Any]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, json.dumps(entries))
    except OSError as error:
        log.warning("config.last_good_not_written", path=str(path), reason=str(error))


def held_names(held: Sequence[HeldModel]) -> frozenset[str]:
    """Return the names and aliases of held models."""
    return frozenset(name for model in held for name in (model.name, *model.aliases))
