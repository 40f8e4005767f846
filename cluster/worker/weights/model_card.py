"""Model cards: the YAML metadata at the start of a model's README.md, as on the Hugging Face hub."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

FIELDS = ("base_model", "language", "pipeline_tag", "library_name", "model_name", "license_name", "license_link")
MAX_CARD_BYTES = 1 << 20
MAX_TEXT = 256


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
        values = yaml.safe_load(head) if end else None
    except (yaml.YAMLError, RecursionError, ValueError):
        return Card()
    if not isinstance(values, dict):
        return Card()
    license_name = _text(values.get("license")).lower()
    own = _text(values.get("license_name")).lower()
    fields = {name: text for name in FIELDS if (text := _text(values.get(name)))}
    return Card(own if license_name in ("", "other") and own else license_name, fields)


def _text(value: Any) -> str:
    if isinstance(value, list):
        value = ", ".join(str(item) for item in value if isinstance(item, (str, int, float)))
    return str(value)[:MAX_TEXT] if isinstance(value, (str, int, float)) and not isinstance(value, bool) else ""


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
