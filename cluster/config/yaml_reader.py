"""A YAML reader that reports duplicate keys of a mapping.

PyYAML silently keeps the last of two equal keys. A second `models:` would therefore remove every model of the first
`models:`. Each duplicate is reported with the path of the key and both line numbers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import yaml

_Base: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # a PyYAML without libyaml has no CSafeLoader


class Loader(_Base):  # type: ignore[misc] # PyYAML is untyped
    """Loader for YAML's safe types, with its own constructor for dates.

    A library that vLLM imports for structured outputs makes PyYAML's own loader return dates as text. With PyYAML's
    loader, a process with an engine would read a file differently from other processes.
    """


Loader.add_constructor("tag:yaml.org,2002:timestamp", yaml.constructor.SafeConstructor.construct_yaml_timestamp)

Path = tuple[str | int, ...]
MAX_DEPTH = 64
"""Maximum nesting depth of a document. Deeper documents are refused."""
_MERGE = "tag:yaml.org,2002:merge"


class NotYaml(ValueError):
    """Raised for a text that is not YAML or has a duplicate key. The message names the line."""


@dataclass(frozen=True, slots=True)
class Duplicate:
    """A key that appears twice in one mapping. `path` ends with the key. Lines count from 1."""

    path: Path
    line: int
    first_line: int

    def __str__(self) -> str:
        return (
            f"line {self.line}: the key {str(self.path[-1])!r} appears again here, first in line {self.first_line}; "
            "only the last would count: keep one of them"
        )


@dataclass(frozen=True, slots=True)
class Document:
    """A YAML document: the values, the duplicate keys, and the line number of each key and list item, keyed by path."""

    data: Any
    duplicates: tuple[Duplicate, ...] = ()
    lines: Mapping[Path, int] = field(default_factory=dict)

    def line_of(self, path: Path) -> int:
        """Return the line number of a path. For a path that is not in the text, return the line number of its nearest
        parent in the text, or 0."""
        while path:
            if path in self.lines:
                return self.lines[path]
            path = path[:-1]
        return 0


def read_documents(text: str) -> list[Document]:
    """Return every document of a text. The data of an empty document is None. Raises NotYaml."""
    documents: list[Document] = []
    try:
        loader = Loader(text)
        try:
            while loader.check_node():
                node = loader.get_node()
                lines: dict[Path, int] = {}
                duplicates = tuple(_duplicates_in(node, (), lines, set()))
                documents.append(Document(loader.construct_document(node), duplicates, lines))
        finally:
            loader.dispose()
    except yaml.YAMLError as error:
        raise NotYaml(f"not YAML: {_one_line(error)}") from None
    except (ValueError, TypeError, OverflowError, RecursionError) as error:  # an invalid date or number
        raise NotYaml(f"not YAML: {error}") from None
    return documents


def read(text: str) -> Document:
    """Return the only document of a text. The data of an empty document is None. Raises NotYaml."""
    documents = read_documents(text)
    if len(documents) > 1:
        raise NotYaml(f"holds {len(documents)} documents, separated by ---: expected one")
    return documents[0] if documents else Document(None)


def load_documents(text: str) -> list[Any]:
    """Return the values of every document of a text. Raises NotYaml, also for a duplicate key."""
    documents = read_documents(text)
    duplicates = [str(duplicate) for document in documents for duplicate in document.duplicates]
    if duplicates:
        raise NotYaml("; ".join(duplicates))
    return [document.data for document in documents]


def load(text: str) -> Any:
    """Return the values of the only document of a text. Raises NotYaml, also for a duplicate key."""
    document = read(text)
    if document.duplicates:
        raise NotYaml("; ".join(map(str, document.duplicates)))
    return document.data


def _duplicates_in(
    node: yaml.Node, path: Path, lines: dict[Path, int], seen: set[int], around: frozenset[int] = frozenset()
) -> Iterator[Duplicate]:
    """Yield the duplicate keys below a node, and add the line of each path to `lines`.

    `seen`: ids of the nodes that were read already. A node to which YAML aliases refer is read only once. `around`: ids
    of the nodes that contain this node.
    """
    if isinstance(node, yaml.ScalarNode):
        return
    if id(node) in around:
        raise NotYaml(
            f"line {node.start_mark.line + 1}: an alias (*name) repeats the value that contains it, which never ends"
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
            yield from _duplicates_in(item, (*path, at), lines, seen, around)
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
        yield from _duplicates_in(value, where, lines, seen, around)


def _one_line(error: yaml.YAMLError) -> str:
    """Return PyYAML's message without the excerpt from the text. Line numbers in the message count from 1."""
    if isinstance(error, yaml.MarkedYAMLError):
        mark = error.problem_mark or error.context_mark
        message = ", ".join(part for part in (error.context, error.problem) if part)
        return f"line {mark.line + 1}, column {mark.column + 1}: {message}" if mark else message
    return str(error).splitlines()[0] if str(error) else type(error).__name__
