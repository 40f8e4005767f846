"""Fixtures of the parser tests."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from tests.worker.parsing.formats import build_folder, tokenizer_of

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "CRITICAL")


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tokenizer that has the special tokens of all output formats."""
    return build_folder(tmp_path_factory.mktemp("parsing"))


@pytest.fixture(scope="module")
def checkpoint(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama checkpoint with the tokenizer in `folder`."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    made = Path(shutil.copytree(folder, tmp_path_factory.mktemp("real") / "model"))
    tokenizer = tokenizer_of(folder)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        initializer_range=0.15,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        tie_word_embeddings=False,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(made)
    return made
