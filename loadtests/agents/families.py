"""Three families of tokenizers with their chat templates, trained on real code and prose.

Their vocabularies have 32,000 pieces, so that a token covers about as many characters as in a published model. The
tokenizers are of the same kinds as in tests/support/tokenizer_kinds.py, where the vocabularies are smaller.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from tokenizers import AddedToken, Tokenizer, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer

from cluster.wire.bundle import Bundle
from loadtests.agents.conversations import code
from loadtests.datasets import reference
from tests.support import checkpoints, tokenizer_kinds

VOCABULARY: Final = 32_000
FAMILIES: Final = {
    "byte-level": "LLaMA 3's and Qwen's kind, Qwen 2.5's template",
    "metaspace": "sentencepiece, Mistral's kind and template",
    "gpt-2": "Falcon's kind, and its template without special tokens",
}
"""Names of the families, each with its kind in words."""
SCALES: Final = {"byte-level": 1.185, "metaspace": 0.827, "gpt-2": 1.006}
"""For each family, the factor by which a conversation's lengths are multiplied so that its last prompt has 142,000
tokens."""
HAS_TOOLS: Final = ("byte-level",)
"""Families whose template renders tool calls and tool results."""
TEMPLATES: Final = Path(__file__).parents[2] / "tests" / "data" / "chat_templates"
_SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


def bundle(family: str) -> Bundle:
    """Train the tokenizer of a family, which takes some seconds, and return the family's bundle."""
    config = {"model_type": family, "max_position_embeddings": 262_144}
    if family == "metaspace":
        tokenizer, template = _metaspace(), checkpoints.TEMPLATES / "mistral.jinja"
        special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    else:
        is_gpt2 = family == "gpt-2"
        tokenizer = _byte_level(tokenizer_kinds.falcon(700)[0] if is_gpt2 else tokenizer_kinds.llama3(700)[0])
        template = checkpoints.TEMPLATES / "falcon.jinja" if is_gpt2 else TEMPLATES / "qwen2.5.jinja"
        special = {"eos_token": "<|im_end|>"}
    return Bundle(
        {
            "tokenizer.json": tokenizer.to_str().encode(),
            "tokenizer_config.json": json.dumps(special).encode(),
            "config.json": json.dumps(config).encode(),
            "chat_template.jinja": template.read_bytes(),
        }
    )


def _corpus() -> list[str]:
    return (reference() + code()).splitlines(keepends=True)


def _byte_level(kind: Tokenizer) -> Tokenizer:
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = kind.pre_tokenizer, kind.decoder
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(
        _corpus(), BpeTrainer(vocab_size=VOCABULARY, initial_alphabet=alphabet, show_progress=False)
    )
    _add(tokenizer, _SPECIALS)
    return tokenizer


def _metaspace() -> Tokenizer:
    trained = Tokenizer(BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    trained.train_from_iterator(_corpus(), BpeTrainer(vocab_size=VOCABULARY - 260, show_progress=False))
    model = json.loads(trained.to_str())["model"]
    head = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    vocabulary = {piece: i for i, piece in enumerate([*head, *sorted(model["vocab"], key=model["vocab"].get)])}
    merges = [tuple(merge) for merge in model["merges"]]
    tokenizer = Tokenizer(BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))  # noqa: S106 - a token of text
    kind = tokenizer_kinds.mistral(700)[0]
    tokenizer.pre_tokenizer, tokenizer.decoder = kind.pre_tokenizer, kind.decoder
    _add(tokenizer, ("<unk>", "<s>", "</s>", "[INST]", "[/INST]"))
    return tokenizer


def _add(tokenizer: Tokenizer, specials: Sequence[str]) -> None:
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in specials])
