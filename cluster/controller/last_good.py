"""The models of the last right file, kept beside a controller for a start that meets a wrong one."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import structlog

from cluster.api.outcomes import CallError
from cluster.config.lenient import HeldModel, Lenient
from cluster.config.schema import Config, entry_of, with_models

log = structlog.get_logger("controller")
FILE = "last-good-models.json"


def with_last_good(found: Lenient, folder: Path) -> Lenient:
    """Put the last right entry in the place of each wrong one, where there is one that still fits; keep the right
    entries for the next start. Models without one stay held."""
    path = folder / FILE
    before = _read(path)
    made = _restored(found, before)
    if found.problems:
        log.error(
            "config_partly_refused",
            problems=found.problems[:10],
            restored=sorted({one.name for one in made.config.models} - {one.name for one in found.config.models}),
            held="all that runs" if made.all_held else [one.name for one in made.held],
        )
    now = {model.name: entry_of(model) for model in made.config.models}
    if made.all_held:
        now = dict(before) | now
    now |= {one.name: before[one.name] for one in made.held if one.name in before}
    _write(path, now)
    return made


def _restored(found: Lenient, before: Mapping[str, Any]) -> Lenient:
    config, held = found.config, []
    if found.all_held:
        whole = _with(config, list(before.values()), ())
        return found if whole is None or not before else replace(found, config=whole, held=(), all_held=False)
    for one in found.held:
        names = {name for other in found.held if other is not one for name in (other.name, *other.aliases)}
        entries = [entry_of(model) for model in config.models]
        tried = _with(config, [*entries, before[one.name]], names) if one.name in before else None
        if tried is None:
            held.append(one)
        else:
            config = tried
    return replace(found, config=config, held=tuple(held))


def _with(config: Config, entries: Sequence[Mapping[str, Any]], absent: set[str] | tuple[str, ...]) -> Config | None:
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
        log.warning("last_good_models_unreadable", path=str(path), reason=str(error))
        return {}
    return {name: one for name, one in values.items() if isinstance(one, dict)} if isinstance(values, dict) else {}


def _write(path: Path, entries: Mapping[str, Any]) -> None:
    draft = path.with_suffix(".new")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        draft.write_text(json.dumps(entries))
        draft.replace(path)
    except OSError as error:
        log.warning("last_good_models_not_kept", path=str(path), reason=str(error))


def held_names(held: Sequence[HeldModel]) -> frozenset[str]:
    """Names and aliases of models that are held."""
    return frozenset(name for one in held for name in (one.name, *one.aliases))
