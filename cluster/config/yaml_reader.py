"""A YAML reader that refuses what YAML itself would lose silently: a key that stands twice in one mapping.

PyYAML keeps the last of two equal keys and drops the first without a word, so a second `models:` would remove every
model of the first. Each duplicate is reported with its path and both line numbers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import yaml

_Base: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # a PyYAML without libyaml has no CSafeLoader


class Loader(_Base):  # type: ignore[misc] # PyYAML is untyped
    """YAML's safe types, with a constructor of its own for dates.

    Problem: a library that vLLM imports for structured outputs turns dates into text in PyYAML's class, for the whole
    process, so that a file would be read in one way by a process with an engine and in another without.
    """


Loader.add_constructor("tag:yaml.org,2002:timestamp", yaml.constructor.SafeConstructor.construct_yaml_timestamp)

Path = tuple[str | int, ...]
MAX_DEPTH = 64
"""Nesting that a document may have; deeper ones are no configuration."""
_MERGE = "tag:yaml.org,2002:merge"


class NotYaml(ValueError):
    """The text is not YAML, or holds a key twice; the message names the line."""


@dataclass(frozen=True, slots=True)
class Duplicate:
    """A key that stands twice in one mapping; `path` ends with it. Lines count from 1."""

    path: Path
    line: int
    first_line: int

    def __str__(self) -> str:
        return (
            f"line {self.line}: the key {str(self.path[-1])!r} stands here again, first in line {self.first_line}; "
            "only the last would count: keep one of them"
        )


@dataclass(frozen=True, slots=True)
class Document:
    """One YAML document: its values, its duplicate keys, and the line of each key and list item by path."""

    data: Any
    duplicates: tuple[Duplicate, ...] = ()
    lines: Mapping[Path, int] = field(default_factory=dict)

    def line_of(self, path: Path) -> int:
        """The line of a path, or of its nearest parent that has one; 0 when nothing of it is in the text."""
        while path:
            if path in self.lines:
                return self.lines[path]
            path = path[:-1]
        return 0


def read_documents(text: str) -> list[Document]:
    """Every document of a text; an empty one has no data (None). Raises NotYaml for what is not YAML."""
    documents: list[Document] = []
    try:
        loader = Loader(text)
        try:
            while loader.check_node():
                node = loader.get_node()
                lines: dict[Path, int] = {}
                duplicates = tuple(_walk(node, (), lines, set()))
                documents.append(Document(loader.construct_document(node), duplicates, lines))
        finally:
            loader.dispose()
    except yaml.YAMLError as error:
        raise NotYaml(f"not YAML: {_one_line(error)}") from None
    except (ValueError, TypeError, OverflowError, RecursionError) as error:  # a date or number that cannot be
        raise NotYaml(f"not YAML: {error}") from None
    return documents


def read(text: str) -> Document:
    """The only document of a text, None for an empty one. Raises NotYaml."""
    documents = read_documents(text)
    if len(documents) > 1:
        raise NotYaml(f"holds {len(documents)} documents, separated by ---: expected one")
    return documents[0] if documents else Document(None)


def load_documents(text: str) -> list[Any]:
    """The values of every document. Raises NotYaml, for a key that stands twice too."""
    documents = read_documents(text)
    wrong = [str(one) for document in documents for one in document.duplicates]
    if wrong:
        raise NotYaml("; ".join(wrong))
    return [document.data for document in documents]


def load(text: str) -> Any:
    """The values of the only document. Raises NotYaml, for a key that stands twice too."""
    document = read(text)
    if document.duplicates:
        raise NotYaml("; ".join(map(str, document.duplicates)))
    return document.data


def _walk(
    node: yaml.Node, path: Path, lines: dict[Path, int], seen: set[int], around: frozenset[int] = frozenset()
) -> Iterator[Duplicate]:
    """The duplicates below a node, once even where aliases repeat it; `lines` gets each path's line."""
    if isinstance(node, yaml.ScalarNode):
        return
    if id(node) in around:
        raise NotYaml(
            f"line {node.start_mark.line + 1}: an alias (*name) repeats the value that it is part of, which never ends"
        )
    if id(node) in seen:
        return
    if len(path) > MAX_DEPTH:
        raise NotYaml(f"line {node.start_mark.line + 1}: nested deeper than {MAX_DEPTH}")
    seen.add(id(node))
    around = around | {id(node)}
    if isinstance(node, yaml.SequenceNode):
        for at, item in enumerate(node.value):
            lines[(*path, at)] = item.start_mark.line + 1
            yield from _walk(item, (*path, at), lines, seen, around)
        return
    first: dict[tuple[str, str], int] = {}
    for key, value in node.value:
        line = key.start_mark.line + 1
        name = str(key.value) if isinstance(key, yaml.ScalarNode) else "?"
        where = (*path, name)
        if isinstance(key, yaml.ScalarNode) and key.tag != _MERGE:
            mark = (key.tag, name)
            if mark in first:
                yield Duplicate(where, line, first[mark])
            first.setdefault(mark, line)
        lines[where] = line
        yield from _walk(value, where, lines, seen, around)


def _one_line(error: yaml.YAMLError) -> str:
    """PyYAML's words without the excerpt, with lines that count from 1."""
    if isinstance(error, yaml.MarkedYAMLError):
        mark = error.problem_mark or error.context_mark
        told = ", ".join(one for one in (error.context, error.problem) if one)
        return f"line {mark.line + 1}, column {mark.column + 1}: {told}" if mark else told
    return str(error).splitlines()[0] if str(error) else type(error).__name__
