"""Pooling models of the tests: the real all-MiniLM-L6-v2, and a tiny random cross-encoder."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from cluster.worker.weights import demo_model

PACKAGE_FOLDER = Path(__file__).parents[2] / ".minilm"
"""Folder where `make minilm` installs the package of the embedding model."""
WORDS = ("red", "green", "blue", "river", "mountain", "cat", "dog", "runs", "sleeps", "why", "the", "a", "old", "new")


def minilm(cache_dir: Path) -> Path:
    """Return the folder of all-MiniLM-L6-v2; skip the test if its package is not installed."""
    if str(PACKAGE_FOLDER) not in sys.path:
        sys.path.append(str(PACKAGE_FOLDER))
    try:
        return demo_model.ensure_demo_model(cache_dir, source=demo_model.MINILM_SOURCE)
    except demo_model.DemoModelError as error:
        pytest.skip(str(error))


def build_cross_encoder(folder: Path, labels: int = 1) -> Path:
    """Write a tiny random BertForSequenceClassification with its tokenizer into `folder`; return the folder. Its scores
    depend on the token types."""
    import torch
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

    vocab = {"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3, "[MASK]": 4, **{w: 5 + i for i, w in enumerate(WORDS)}}
    backend = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS]:0 $A:0 [SEP]:0",
        pair="[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    special = {"unk_token": "[UNK]", "pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    names = ["input_ids", "token_type_ids", "attention_mask"]  # as BertTokenizer's
    tokenizer: Any = PreTrainedTokenizerFast(
        tokenizer_object=backend, mask_token="[MASK]", model_input_names=names, **special
    )
    config = BertConfig(
        vocab_size=1024,
        hidden_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=128,
        max_position_embeddings=96,
        type_vocab_size=2,
        num_labels=labels,
        initializer_range=0.2,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = BertForSequenceClassification(config)
    model.save_pretrained(folder, safe_serialization=True)
    tokenizer.save_pretrained(folder)
    return folder
