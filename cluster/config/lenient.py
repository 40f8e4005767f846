"""Reads a partly invalid configuration, so that a restarting process can start with the valid rest.

Problem: a change of the file takes effect only when a process restarts. An invalid entry is therefore first read by the
process that restarts next, perhaps hours later. If that process exited, one typing error would end the whole fleet, one
restart at a time.

Invariants: An invalid entry changes no running model. Entries that share a name change no running model either. A
problem in a section that a process needs still prevents the start of the process.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cluster.config.document import ConfigError, examine, line, names_of, read_document, read_text
from cluster.config.problems import Problem
from cluster.config.schema import Config
from cluster.config.yaml_reader import Document

GATEWAY_OPTIONAL_SECTIONS = ("models", "weights", "ray")
"""Sections that a gateway does not use, since a gateway gets the models from the controller and the workers."""


@dataclass(frozen=True, slots=True)
class HeldModel:
    """A model with an invalid entry. The model's running replicas stay unchanged.

    `aliases` and `fallback`: the values in the invalid entry, as far as they can be read.
    """

    name: str
    aliases: tuple[str, ...] = ()
    fallback: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class PartialConfig:
    """The valid parts of a configuration, and the problems of the invalid parts. `held`: the models with an
    invalid entry, which must stay as they run now.

    `all_held`: all running models must stay as they are, since the `models` section cannot be read as a list of
    entries.
    """

    config: Config
    problems: tuple[str, ...] = ()
    held: tuple[HeldModel, ...] = field(default_factory=tuple)
    all_held: bool = False


def load_for_gateway(path: Path) -> PartialConfig:
    """Read the configuration file with which a gateway starts. Invalid sections among GATEWAY_OPTIONAL_SECTIONS
    are left out, and their problems are in the result.

    Raises ConfigError for a problem in any other section.
    """
    return for_gateway(read_text(path), str(path))


def load_for_controller(path: Path) -> PartialConfig:
    """Read the configuration file with which a controller starts. Raises ConfigError for a problem outside `models`."""
    return for_controller(read_text(path), str(path))


def for_gateway(text: str, where: str = "configuration") -> PartialConfig:
    """Read the text of a configuration file with which a gateway starts. Invalid sections among
    GATEWAY_OPTIONAL_SECTIONS are left out, and their problems are in the result. Raises ConfigError for a problem in
    any other section. `where`: name of the file in error messages."""
    document = read_document(text, where)
    config, wrong = examine(document)
    if config is not None:
        return PartialConfig(config)
    for sections in (GATEWAY_OPTIONAL_SECTIONS[:1], GATEWAY_OPTIONAL_SECTIONS[:2], GATEWAY_OPTIONAL_SECTIONS):
        rest, remaining = examine(_without_sections(document, sections))
        if rest is not None:
            return PartialConfig(rest, _lines(wrong, where, document))
    lines = _lines([*wrong, *(problem for problem in remaining if problem not in wrong)], where, document)
    raise ConfigError("\n".join(lines))


def for_controller(text: str, where: str = "configuration") -> PartialConfig:
    """Return the configuration in `text`, the contents of a controller's configuration file. Problems in the section
    `models` are returned with the rest of the configuration; any other problem raises ConfigError. `where`: name of the
    file in error messages."""
    document = read_document(text, where)
    config, wrong = examine(document)
    if config is not None:
        return PartialConfig(config)
    without_models, _ = examine(_without_sections(document, ("models",)))
    if without_models is None:
        raise ConfigError("\n".join(_lines(wrong, where, document)))
    entries = document.data.get("models")
    is_duplicate = any(duplicate.path == ("models",) for duplicate in document.duplicates)
    problems = _lines(wrong, where, document)
    if not isinstance(entries, list) or is_duplicate:
        return PartialConfig(without_models, problems, _held(entries if isinstance(entries, list) else []), True)
    return _without_wrong_entries(document, entries, without_models, problems)


def _without_wrong_entries(
    document: Document, entries: Sequence[Any], without_models: Config, problems: tuple[str, ...]
) -> PartialConfig:
    """Return the configuration without invalid model entries. Entries with problems are removed and the rest is checked
    again, until the rest is valid. `without_models`: the configuration to return if a remaining problem belongs to no
    entry."""
    left_out = {*_with_duplicate_keys(document), *_conflicting(entries)}
    while True:
        staying = [at for at in range(len(entries)) if at not in left_out]
        rest = document.data | {"models": [entries[at] for at in staying]}
        absent = names_of({"models": [entries[at] for at in left_out]})
        others = tuple(duplicate for duplicate in document.duplicates if duplicate.path[0] != "models")
        config, wrong = examine(Document(rest, others), absent)
        if config is not None:
            return PartialConfig(config, problems, _held([entries[at] for at in sorted(left_out)], config))
        more = {
            staying[problem.path[1]]
            for problem in wrong
            if problem.path[0] == "models" and isinstance(problem.path[1], int)
        }
        if not more:
            return PartialConfig(without_models, problems, _held(entries), True)
        left_out |= more


def _without_sections(document: Document, sections: Collection[str]) -> Document:
    """Return the document with these sections empty.

    A `ray` section that has entries gets one placeholder entry instead, since other rules depend on whether there is a
    Ray cluster.
    """
    data = {key: value for key, value in document.data.items() if key not in sections} | {"models": []}
    if "models" not in sections:
        data["models"] = document.data.get("models")
    if "ray" in sections and document.data.get("ray"):
        data["ray"] = [{"name": "unread", "dashboard_url": "http://127.0.0.1:8265"}]
    return Document(data, tuple(duplicate for duplicate in document.duplicates if duplicate.path[0] not in sections))


def _with_duplicate_keys(document: Document) -> set[int]:
    """Return the positions of model entries with a duplicate key."""
    return {
        duplicate.path[1]
        for duplicate in document.duplicates
        if duplicate.path[0] == "models" and len(duplicate.path) > 2 and isinstance(duplicate.path[1], int)
    }


def _conflicting(entries: Sequence[Any]) -> set[int]:
    """Return the positions of all entries that share a name or alias with another entry. The caller leaves all of them
    out, since the intended entry is unknown."""
    owners: dict[str, set[int]] = {}
    for at, entry in enumerate(entries):
        for name in names_of({"models": [entry]}):
            owners.setdefault(name, set()).add(at)
    return {at for positions in owners.values() if len(positions) > 1 for at in positions}


def _held(entries: Sequence[Any], beside: Config | None = None) -> tuple[HeldModel, ...]:
    """Return the models that are held because their entries are invalid, each model once. `entries`: the invalid
    entries. `beside`: the valid rest of the configuration. A model whose name is also a name or alias in `beside` is
    left out."""
    taken = {name for model in beside.models for name in (model.name, *model.aliases)} if beside is not None else set()
    held: dict[str, HeldModel] = {}
    for entry in entries:
        name = entry.get("name") if isinstance(entry, dict) else None
        if isinstance(name, str) and name not in taken and name not in held:
            held[name] = HeldModel(name, fallback=_strings(entry.get("fallback")))
    taken |= held.keys()
    for entry in entries:
        name = entry.get("name") if isinstance(entry, dict) else None
        if isinstance(name, str) and name in held and not held[name].aliases:
            aliases = tuple(alias for alias in _strings(entry.get("aliases")) if alias not in taken)
            held[name] = HeldModel(name, aliases, held[name].fallback)
            taken |= set(aliases)
    return tuple(held.values())


def _strings(value: Any) -> tuple[str, ...]:
    return tuple(item for item in value if isinstance(item, str)) if isinstance(value, list) else ()


def _lines(wrong: Sequence[Problem], where: str, document: Document) -> tuple[str, ...]:
    return tuple(line(problem, where, document) for problem in wrong)
