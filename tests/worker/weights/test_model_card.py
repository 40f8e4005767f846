"""Model cards and licences: a card is read, and its licence is allowed or refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster.api.types import ModelSpec
from cluster.worker.weights.model_card import Card, read_card, why_refused
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
