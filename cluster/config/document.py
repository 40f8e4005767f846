"""Reading the text of a cluster.yaml. The result is a configuration, or all problems of the text with key and line."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from cluster.api.outcomes import CallError, Outcome, Violation
from cluster.config.model import Model
from cluster.config.problems import Path as KeyPath
from cluster.config.problems import Problem, problems_of, shown
from cluster.config.remainder import without
from cluster.config.schema import API_VERSION, Config
from cluster.config.yaml_reader import Document, Duplicate, NotYaml, read


class ConfigError(ValueError):
    """Raised when the configuration is invalid. The message names the file, the key's path and the remedy."""


def parse(text: str, where: str = "configuration") -> Config:
    """Read and check the text of a cluster.yaml. Raises ConfigError with the path of every wrong key."""
    document = read_document(text, where)
    config, wrong = examine(document)
    if config is None:
        raise ConfigError("\n".join(line(problem, where, document) for problem in wrong))
    return config


def read_document(text: str, where: str) -> Document:
    """Read the text of a cluster.yaml as YAML. Duplicate keys are accepted here. Raises ConfigError."""
    try:
        document = read(text)
    except NotYaml as error:
        raise ConfigError(f"{where}: {error}") from None
    if not isinstance(document.data, dict):
        raise ConfigError(f"{where}: expected a mapping that begins with `api_version: {API_VERSION}`")
    return document


def line(problem: Problem, where: str, document: Document) -> str:
    """Return a problem as one line of an error message, with the name of the file and the line number."""
    at = document.line_of(problem.path)
    return f"{where}: {problem}{f' (line {at})' if at else ''}"


def examine(document: Document, absent: Collection[str] = ()) -> tuple[Config | None, list[Problem]]:
    """Return the configuration in a document (None if the document is invalid), and the problems of the document.

    `absent`: names of models that were left out of the document. Fallbacks may name these models.
    """
    config, wrong = without_invalid_keys(document, absent)
    return (None if wrong else config), wrong


def without_invalid_keys(document: Document, absent: Collection[str] = ()) -> tuple[Config | None, list[Problem]]:
    """Return the configuration in a document without the wrong keys, and all problems of the document.

    A wrong key can hide problems elsewhere. Wrong keys are therefore removed and the rest is checked again, until the
    rest is valid. The configuration is None if the rest never becomes valid. A model entry that stays invalid is
    replaced by a placeholder, whose name is LEFT_OUT followed by the entry's position.
    """
    zero_bytes = [*_zero_bytes((), document.data, set())]
    wrong = [_duplicate_problem(duplicate) for duplicate in document.duplicates]
    wrong += zero_bytes
    data: Any = without(document.data, [problem.path for problem in zero_bytes])
    removed: list[KeyPath] = []
    while data is not None and len(removed) < MAX_PROBLEMS:
        try:
            return Config.model_validate(data, context={"absent": {*absent, *names_of(document.data)}}), wrong
        except ValidationError as error:
            problems = problems_of(error, Config)
        wrong += [problem for problem in problems if problem not in wrong and not _follows(problem, removed)]
        removed += [problem.path for problem in problems]
        data = without(data, [problem.path for problem in problems])
    return None, wrong


def _zero_bytes(path: KeyPath, value: Any, seen: set[int]) -> Iterator[Problem]:
    """Yield a problem for each text with a zero byte, since file names and program arguments cannot contain one.

    `seen`: ids of the values that were checked already, since YAML aliases may repeat a value.
    """
    if isinstance(value, str) and "\0" in value:
        yield Problem(path, f"{shown(value)} holds a zero byte (\\0): take it out")
    if not isinstance(value, dict | list) or id(value) in seen:
        return
    seen.add(id(value))
    for key, item in value.items() if isinstance(value, dict) else enumerate(value):
        yield from _zero_bytes((*path, key if isinstance(key, str | int) else str(key)), item, seen)


MAX_PROBLEMS = 1000
_DEPENDS_ON_ALL = ("gateway", "auth", "classes", "tenants", "tenant_defaults", "ray", "observe")
_MODELS_DEPEND_ON = ("weights", "ray", "scaling")


def _duplicate_problem(key: Duplicate) -> Problem:
    text = f"the key appears again here, first in line {key.first_line}; only the last would count: keep one of them"
    return Problem(key.path, text)


def _follows(problem: Problem, removed: Sequence[KeyPath]) -> bool:
    """Return whether a problem may exist only because the keys in `removed` were removed."""
    if problem.missing and problem.path in removed:
        return True
    section = problem.path[0] if problem.path else ""
    sections = {path[0] for path in removed if path}
    if section in ("models", "scaling"):
        within = [path for path in removed if path[:2] == problem.path[:2] or problem.path[: len(path)] == path]
        return any(name in sections for name in _MODELS_DEPEND_ON) or (problem.missing and bool(within))
    return any(name in sections for name in _DEPENDS_ON_ALL)


def names_of(data: Any) -> set[str]:
    """Return the model names and aliases in a document's `models`. Names that cannot be read are left out."""
    entries = data.get("models") if isinstance(data, dict) else None
    names: set[str] = set()
    for entry in entries if isinstance(entries, list) else ():
        if isinstance(entry, dict):
            aliases = entry.get("aliases")
            names |= {
                name
                for name in (entry.get("name"), *(aliases if isinstance(aliases, list) else ()))
                if isinstance(name, str)
            }
    return names


def with_models(config: Config, entries: Sequence[Mapping[str, Any]], absent: Collection[str] = ()) -> Config:
    """Return the configuration with the models in `entries` instead of the models of `config`, checked as a whole.

    `absent`: names of further models that entries may name as fallbacks, although no entry describes them. Raises
    CallError, which names every wrong key with the model's name.
    """
    plain: dict[str, Any] = config.model_dump(mode="json", exclude_unset=True, by_alias=True)
    changed, wrong = examine(Document(plain | {"models": [dict(entry) for entry in entries]}), absent)
    if changed is None:
        names = [str(entry.get("name")) for entry in entries]
        violations = [Violation(_by_name(problem.where, names), problem.text) for problem in wrong]
        raise CallError(
            Outcome.INVALID_FIELD,
            "; ".join(f"{violation.field}: {violation.description}" for violation in violations),
            violations=violations,
        )
    return changed


def _by_name(where: str, names: Sequence[str]) -> str:
    """Replace the position of a model in the path `where` by the model's name: `models[0].engine` becomes
    `models[NAME].engine`. `names`: model names by position."""
    return re.sub(r"^models\[(\d+)\]", lambda match: f"models[{names[int(match[1])]}]", where)


def entry_of(model: Model) -> dict[str, Any]:
    """Return a model's entry as plain values without defaults, so that equal models have equal entries."""
    plain: dict[str, Any] = model.model_dump(mode="json", exclude_defaults=True)
    return {"name": model.name, "source": model.source} | plain


def load(path: Path) -> Config:
    """Read and check a cluster.yaml. Raises ConfigError."""
    return parse(read_text(path), str(path))


def read_text(path: Path) -> str:
    """Return the text of a file. Raises ConfigError."""
    try:
        return path.read_text()
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: is not UTF-8: {error.reason} at byte {error.start}") from None
