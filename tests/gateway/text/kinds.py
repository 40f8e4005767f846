"""The tokenizers under test: one tiny tokenizer for each family, loaded by transformers and by the gateway."""

from __future__ import annotations

import string
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from cluster.gateway.text.tokenizer import TextModel
from tests.support.corpus import SAMPLES


@dataclass(frozen=True)
class Kind:
    """The tokenizer of one family, loaded by transformers and by the gateway, with token ids that are worth testing."""

    family: str
    folder: Path
    theirs: Any
    ours: TextModel
    byte_ids: tuple[int, ...]
    special_ids: tuple[int, ...]
    sample_ids: tuple[int, ...]


def kind_of(family: str, folder: Path, theirs: Any, ours: TextModel) -> Kind:
    """Return the Kind of a family. The ids in it are those of incomplete characters, of special tokens, and of the
    tokens of the sample texts."""
    broken = [i for i in range(len(theirs)) if "\ufffd" in theirs.decode([i])]
    sample = [token_id for text in SAMPLES for token_id in theirs.encode(text, add_special_tokens=False)]
    return Kind(family, folder, theirs, ours, tuple(broken), tuple(theirs.all_special_ids), tuple(sample))


def token_ids(kind: Kind, *, beyond_vocabulary: bool = False) -> st.SearchStrategy[list[int]]:
    """Return a Hypothesis strategy for lists of token ids, made of any tokens, broken characters, special tokens, and
    pieces of real text."""
    pieces = st.integers(0, len(kind.sample_ids) - 1).flatmap(
        lambda start: st.integers(1, 12).map(lambda size: list(kind.sample_ids[start : start + size]))
    )
    singles: list[st.SearchStrategy[int]] = [
        st.integers(0, len(kind.theirs) - 1),
        st.sampled_from(kind.byte_ids),
        st.sampled_from(kind.special_ids),
    ]
    if beyond_vocabulary:
        singles.append(st.integers(len(kind.theirs), len(kind.theirs) + 50))
    runs = st.one_of(pieces, st.lists(st.one_of(singles), max_size=8))
    return st.lists(runs, max_size=6).map(lambda parts: [token_id for part in parts for token_id in part])


TEXTS = st.one_of(
    st.sampled_from(SAMPLES),
    st.text(max_size=60),
    st.text(alphabet=string.printable, max_size=60),
    st.lists(
        st.sampled_from(["<s>", "<|eot_id|>", "[INST]", "<|endoftext|>", " ", "  ", "a", "\n", "é", "🎉"]), max_size=12
    ).map("".join),
)
"""Strategy for prompts in all scripts. Some prompts hold odd spaces or the texts of special tokens."""


def with_template(kind: Kind, templates: Mapping[str, str]) -> TextModel:
    """Return a TextModel of the kind with other chat templates. `templates`: the source of each template by name."""
    from cluster.wire.bundle import Bundle
    from cluster.worker.weights.tokenizer_bundle import build_bundle

    files = {n: c for n, c in build_bundle(kind.folder).files.items() if not n.startswith("chat_template")}
    for name, source in templates.items():
        files["chat_template.jinja" if name == "default" else f"chat_template.{name}.jinja"] = source.encode()
    return TextModel.from_bundle(Bundle(files))
