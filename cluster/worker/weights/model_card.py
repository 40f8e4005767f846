"""Model cards: the YAML metadata at the start of a model's README.md, as on the Hugging Face hub."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import yaml

FIELDS = ("base_model", "language", "pipeline_tag", "library_name", "model_name", "license_name", "license_link")
MAX_CARD_BYTES = 1 << 20
MAX_PARSED_CHARS: Final = 64 << 10
"""Maximum number of characters of a card that are parsed as YAML."""
MAX_TEXT = 256
_PARSED: Final = frozenset(("license", *FIELDS))
_NULLS: Final = frozenset(("", "~", "null", "Null", "NULL"))
_BOOLS: Final = frozenset(
    form for word in ("yes", "no", "true", "false", "on", "off") for form in (word, word.title(), word.upper())
)
# Makes only strings: conversion of numbers costs quadratic time. A PyYAML without libyaml has no CBaseLoader.
_LOADER: Final[Any] = getattr(yaml, "CBaseLoader", yaml.BaseLoader)


@dataclass(frozen=True, slots=True)
class Card:
    """A model card.

    `license`: the hub's name of the licence, in lower case. `fields`: other values of the card, shortened. Their
    names are among FIELDS.
    """

    license: str = ""
    fields: Mapping[str, str] = field(default_factory=dict)


def read_card(folder: Path) -> Card:
    """Return the folder's model card; an empty card if there is none or it cannot be parsed."""
    try:
        with (folder / "README.md").open("rb") as file:
            text = file.read(MAX_CARD_BYTES).decode("utf-8", "replace")
    except OSError:
        return Card()
    if not text.startswith("---\n"):
        return Card()
    head, end, _ = text[4:].partition("\n---")
    try:
        root = yaml.compose(_parsed_part(head), _LOADER) if end else None
    except Exception:  # PyYAML also raises errors other than YAMLError for malformed text
        return Card()
    if not isinstance(root, yaml.MappingNode):
        return Card()
    values = {key.value: value for key, value in root.value if isinstance(key, yaml.ScalarNode)}
    license_name = _text(values.get("license")).lower()
    own = _text(values.get("license_name")).lower()
    fields = {name: text for name in FIELDS if (text := _text(values.get(name)))}
    return Card(own if license_name in ("", "other") and own else license_name, fields)


def _parsed_part(head: str) -> str:
    """Return the part of a card's metadata to parse: all of it, or only the entries that a Card uses if it is long.

    The cards of many embedding models list thousands of benchmark results. The part is empty if it is too long itself.
    """
    if len(head) > MAX_PARSED_CHARS:
        entries = re.split(r"^(?=\w)", head, flags=re.MULTILINE)
        head = "".join(entry for entry in entries if entry.partition(":")[0].rstrip() in _PARSED)
    return head if len(head) <= MAX_PARSED_CHARS else ""


def _text(node: Any) -> str:
    """Return the text of a card's field; "" if the field has no text. The items of a list are joined."""
    if isinstance(node, yaml.SequenceNode):
        return ", ".join(text for item in node.value if (text := _scalar(item)))[:MAX_TEXT]
    text = _scalar(node)
    return "" if text in _BOOLS and not node.style else text[:MAX_TEXT]


def _scalar(node: Any) -> str:
    """Return the text of a string or a number; "" for null, for other nodes and for a value with another type tag."""
    if not isinstance(node, yaml.ScalarNode) or node.tag != "tag:yaml.org,2002:str":
        return ""
    text: str = node.value
    return "" if text in _NULLS and not node.style else text


def why_refused(named: str, card: Card, allowed: tuple[str, ...]) -> str:
    """Return why a model's licence does not allow loading the model; "" if the licence allows it.

    `named`: the licence in the catalog entry; "" for none. The licence in the entry is used if the card names no
    licence, and must not contradict the card. `allowed`: names of the allowed licences; if empty, all licences are
    allowed.
    """
    if not allowed:
        return ""
    licenses = {name.lower() for name in allowed}
    if card.license and named and named != card.license:
        return f"the entry says {named!r} and the model's card says {card.license!r}"
    has = card.license or named
    if not has:
        return "neither the model's card nor the entry's `license` names a licence; weights.allow.licenses requires one"
    return "" if has in licenses else f"{has!r} is not among weights.allow.licenses"
