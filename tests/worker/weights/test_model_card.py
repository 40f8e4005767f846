"""Model cards and licences: a card is read, and its licence is allowed or refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.api.types import ModelSpec
from cluster.worker.weights.model_card import MAX_PARSED_CHARS, Card, read_card, why_refused
from cluster.worker.weights.sources import SourceError, SourceRules, resolve

CARD = """---
license: Apache-2.0
language: [en, de]
base_model: org/base
tags: [x]
---
# A model
---
"""


def test_a_card(tmp_path: Path) -> None:
    """A card has the licence and the known fields of the metadata, as short texts."""
    (tmp_path / "README.md").write_text(CARD)
    assert read_card(tmp_path) == Card("apache-2.0", {"language": "en, de", "base_model": "org/base"})


@pytest.mark.parametrize("text", [None, "# only text", "---\nlicense: [", "---\n- a\n---\n", "---\nlicense: mit\n"])
def test_no_card(tmp_path: Path, text: str | None) -> None:
    """A missing or unreadable card is read as an empty card."""
    if text is not None:
        (tmp_path / "README.md").write_text(text)
    assert read_card(tmp_path) == Card()


@pytest.mark.parametrize(
    "value",
    [
        "!!bool x",
        "!!timestamp x",
        "!!int x",
        "!!float 1:x",
        '"\\UFFFFFFFF"',
        "null",
        "~",
        "no",
        "{a: b}",
        "[[[a]]]",
        "&a [*a]",
        "[" * 50_000,
        "- " * 30_000,
    ],
)
def test_a_field_that_is_no_text(tmp_path: Path, value: str) -> None:
    """A field that is malformed or has another type than text and numbers is no field of the card, and no error."""
    (tmp_path / "README.md").write_text(f"---\nlicense: {value}\nbase_model: {value}\n---\n")
    assert read_card(tmp_path) == Card()


def test_numbers_are_not_converted(tmp_path: Path) -> None:
    """A number is read as the text that the card has, however long it is."""
    number = "0x" + "f" * 6000
    (tmp_path / "README.md").write_text(f"---\nmodel_name: {number}\nlanguage: [en, no, null, 1.50, 'null']\n---\n")
    assert read_card(tmp_path).fields == {"model_name": number[:256], "language": "en, no, 1.50, null"}


def test_a_long_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the used entries of a card with much metadata are parsed, and at most MAX_PARSED_CHARS characters."""
    parsed: list[int] = []
    compose = yaml.compose

    def counted(text: str, loader: Any) -> Any:
        parsed.append(len(text))
        return compose(text, loader)

    monkeypatch.setattr(yaml, "compose", counted)
    results = "model-index:\n- name: x\n" + "  - [1:1:1:1, [], []]\n" * 20_000
    (tmp_path / "README.md").write_text(f"---\nlanguage:\n- en\n- de\n{results}license: mit\n---\n")
    assert read_card(tmp_path) == Card("mit", {"language": "en, de"})
    (tmp_path / "README.md").write_text(f"---\nlicense: mit\nlanguage: [{'[],' * 200_000}]\n---\n")
    assert read_card(tmp_path) == Card()
    assert max(parsed) <= MAX_PARSED_CHARS


def test_a_licence_of_its_own(tmp_path: Path) -> None:
    """If the licence is `other`, the card has the licence name in `license_name`."""
    (tmp_path / "README.md").write_text("---\nlicense: other\nlicense_name: Llama3.1\n---\n")
    assert read_card(tmp_path).license == "llama3.1"


@pytest.mark.parametrize(
    ("named", "card", "allowed", "reason"),
    [
        ("", "", (), ""),
        ("", "mit", (), ""),
        ("", "mit", ("MIT",), ""),
        ("mit", "", ("mit",), ""),
        ("", "gpl", ("mit",), "'gpl' is not among"),
        ("", "", ("mit",), "neither"),
        ("mit", "gpl", ("mit", "gpl"), "the entry says 'mit' and the model's card says 'gpl'"),
    ],
)
def test_what_is_let_in(named: str, card: str, allowed: tuple[str, ...], reason: str) -> None:
    """Without a list of allowed licences, any model may load. With a list, a model is refused if its licence is unknown
    or not in the list, or if the entry and the model's card name different licences."""
    refusal = why_refused(named, Card(card), allowed)
    assert reason in refusal
    assert bool(refusal) == bool(reason)


def test_a_folder_of_another_licence_is_refused(tmp_path: Path) -> None:
    """A folder whose licence is not allowed is refused before anything is loaded, and the error names the entry."""
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"")
    (tmp_path / "README.md").write_text(CARD)
    spec = ModelSpec("m", str(tmp_path))
    with pytest.raises(SourceError, match=r"models\[m\].license: 'apache-2.0' is not among"):
        resolve(spec, SourceRules(tmp_path, allowed_licenses=("mit",)))
    assert resolve(spec, SourceRules(tmp_path, allowed_licenses=("mit", "apache-2.0"))) == tmp_path
