"""A configuration whose `models` section is partly wrong, as a process that restarts reads it.

Problem: models change while gateways and controller run, so a wrong entry is met by whichever process restarts next,
hours after the change. If that process ended, one typing error would take down the whole fleet, one restart at a time.
Invariants: an entry that is wrong, or whose names clash with another's, changes nothing for its own model and nothing
for the others; whatever is wrong outside of the sections that a process may do without still ends its start.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cluster.config.problems import Problem
from cluster.config.schema import Config, ConfigError, examine, line, names_of, read_document, read_text
from cluster.config.yaml_reader import Document

GATEWAY_DOES_WITHOUT = ("models", "weights", "ray")
"""Sections that a gateway does not read: it learns of models from the controller and from workers."""


@dataclass(frozen=True, slots=True)
class HeldModel:
    """A model whose entry is wrong: what runs of it stays as it is. `aliases` and `fallback` are the entry's, as far as
    they can be read."""

    name: str
    aliases: tuple[str, ...] = ()
    fallback: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Lenient:
    """A configuration without its wrong parts, and what was wrong. `all_held`: nothing that runs may be changed, since
    the section cannot be told apart into entries."""

    config: Config
    problems: tuple[str, ...] = ()
    held: tuple[HeldModel, ...] = field(default_factory=tuple)
    all_held: bool = False


def load_for_gateway(path: Path) -> Lenient:
    """Read a file as a gateway that starts. Raises ConfigError for what is wrong outside of GATEWAY_DOES_WITHOUT."""
    return for_gateway(read_text(path), str(path))


def load_for_controller(path: Path) -> Lenient:
    """Read a file as a controller that starts. Raises ConfigError for what is wrong outside of `models`."""
    return for_controller(read_text(path), str(path))


def for_gateway(text: str, where: str = "configuration") -> Lenient:
    """The same of a text."""
    document = read_document(text, where)
    config, wrong = examine(document)
    if config is not None:
        return Lenient(config)
    for sections in (GATEWAY_DOES_WITHOUT[:1], GATEWAY_DOES_WITHOUT[:2], GATEWAY_DOES_WITHOUT):
        rest, left = examine(_without_sections(document, sections))
        if rest is not None:
            return Lenient(rest, _lines(wrong, where, document))
    lines = _lines([*wrong, *(one for one in left if one not in wrong)], where, document)
    raise ConfigError("\n".join(lines))


def for_controller(text: str, where: str = "configuration") -> Lenient:
    """The same of a text."""
    document = read_document(text, where)
    config, wrong = examine(document)
    if config is not None:
        return Lenient(config)
    bare, _ = examine(_without_sections(document, ("models",)))
    if bare is None:
        raise ConfigError("\n".join(_lines(wrong, where, document)))
    entries = document.data.get("models")
    whole = any(one.path == ("models",) for one in document.duplicates)
    problems = _lines(wrong, where, document)
    if not isinstance(entries, list) or whole:
        return Lenient(bare, problems, _held(entries if isinstance(entries, list) else []), True)
    return _by_entry(document, entries, bare, problems)


def _by_entry(document: Document, entries: Sequence[Any], bare: Config, problems: tuple[str, ...]) -> Lenient:
    """Leave out the wrong entries until the others are right together."""
    left_out = {*_twice_in(document), *_clashing(entries)}
    while True:
        stay = [at for at in range(len(entries)) if at not in left_out]
        rest = document.data | {"models": [entries[at] for at in stay]}
        absent = names_of({"models": [entries[at] for at in left_out]})
        others = tuple(one for one in document.duplicates if one.path[0] != "models")
        config, wrong = examine(Document(rest, others), absent)
        if config is not None:
            return Lenient(config, problems, _held([entries[at] for at in sorted(left_out)], config))
        more = {stay[one.path[1]] for one in wrong if one.path[0] == "models" and isinstance(one.path[1], int)}
        if not more:
            return Lenient(bare, problems, _held(entries), True)
        left_out |= more


def _without_sections(document: Document, sections: Collection[str]) -> Document:
    """The document with these sections empty; of `ray` there stays that there is one."""
    data = {key: value for key, value in document.data.items() if key not in sections} | {"models": []}
    if "models" not in sections:
        data["models"] = document.data.get("models")
    if "ray" in sections and document.data.get("ray"):
        data["ray"] = [{"name": "unread", "dashboard_url": "http://127.0.0.1:8265"}]
    return Document(data, tuple(one for one in document.duplicates if one.path[0] not in sections))


def _twice_in(document: Document) -> set[int]:
    """Positions of entries that hold a key twice."""
    return {
        one.path[1]
        for one in document.duplicates
        if one.path[0] == "models" and len(one.path) > 2 and isinstance(one.path[1], int)
    }


def _clashing(entries: Sequence[Any]) -> set[int]:
    """Positions of all entries that have a name or alias of another: which of them is meant, nobody can tell."""
    owners: dict[str, set[int]] = {}
    for at, entry in enumerate(entries):
        for name in names_of({"models": [entry]}):
            owners.setdefault(name, set()).add(at)
    return {at for them in owners.values() if len(them) > 1 for at in them}


def _held(entries: Sequence[Any], beside: Config | None = None) -> tuple[HeldModel, ...]:
    """The models that these entries name, each once, with names that no right model and no other held one has."""
    taken = {name for model in beside.models for name in (model.name, *model.aliases)} if beside is not None else set()
    found: dict[str, HeldModel] = {}
    for entry in entries:
        name = entry.get("name") if isinstance(entry, dict) else None
        if isinstance(name, str) and name not in taken and name not in found:
            found[name] = HeldModel(name, fallback=_words(entry.get("fallback")))
    taken |= found.keys()
    for entry in entries:
        name = entry.get("name") if isinstance(entry, dict) else None
        if isinstance(name, str) and name in found and not found[name].aliases:
            aliases = tuple(one for one in _words(entry.get("aliases")) if one not in taken)
            found[name] = HeldModel(name, aliases, found[name].fallback)
            taken |= set(aliases)
    return tuple(found.values())


def _words(value: Any) -> tuple[str, ...]:
    return tuple(one for one in value if isinstance(one, str)) if isinstance(value, list) else ()


def _lines(wrong: Sequence[Problem], where: str, document: Document) -> tuple[str, ...]:
    return tuple(line(one, where, document) for one in wrong)
