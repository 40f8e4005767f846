"""Builders of tiny random checkpoints of the supported families. A checkpoint is an ordinary folder with safetensors
and a fast tokenizer.

A checkpoint takes well under a second to build after the first import of transformers. Sizes: hidden 128, 2 layers, 4
heads of 32 (the smallest head that the CPU attention kernels take), 2 KV heads, so that tensor_parallel_size 1 and 2
work. Weights are float32 and spread widely enough that greedy decoding has clear winners and varied text.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from tests.support import tokenizer_kinds

FAMILIES = ("llama", "mistral", "falcon", "llama2")
MAX_POSITION_TOKENS = 4096
VOCAB_SIZES = {"llama": 768, "mistral": 704, "falcon": 704, "llama2": 640}
WEIGHT_SPREAD = 0.15
TEMPLATES = Path(__file__).parent / "checkpoint_templates"


def build_checkpoint(family: str, folder: Path, seed: int = 0) -> Path:
    """Write a checkpoint of `family` (one of FAMILIES) into `folder` and return the folder. `seed`
    decides the weights.
    """
    if family not in FAMILIES:
        raise ValueError(f"unknown family {family!r}: one of {', '.join(FAMILIES)}")
    folder.mkdir(parents=True, exist_ok=True)
    build_tokenizer(family, folder)
    _save_model(family, folder, seed)
    return folder


def build_tokenizer(family: str, folder: Path) -> Path:
    """Write only tokenizer.json, tokenizer_config.json and the chat template of `family`. Needs no transformers."""
    make = {
        "llama": tokenizer_kinds.llama3,
        "mistral": tokenizer_kinds.mistral,
        "falcon": tokenizer_kinds.falcon,
        "llama2": tokenizer_kinds.llama2,
    }[family]
    tokenizer, config = make(VOCAB_SIZES[family])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config["model_max_length"] = MAX_POSITION_TOKENS
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n")
    shutil.copyfile(TEMPLATES / f"{family}.jinja", folder / "chat_template.jinja")
    return folder


def big_tokenizer(folder: Path, vocab_size: int = 128_000) -> Path:
    """Write a byte-level tokenizer of `vocab_size` with made-up merges (no training), for measurements of start-up."""
    tokenizer_kinds.synthetic(vocab_size).save(str(_made(folder) / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config) + "\n")
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": vocab_size}) + "\n")
    shutil.copyfile(TEMPLATES / "llama.jinja", folder / "chat_template.jinja")
    return folder


def big_vocabulary_checkpoint(folder: Path, vocab_size: int) -> Path:
    """Write a tiny Llama checkpoint with a vocabulary of `vocab_size` tokens, of which most are three bytes long."""
    big_tokenizer(folder, vocab_size)
    _save_model("llama", folder, 0, vocab_size)
    return folder


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _save_model(family: str, folder: Path, seed: int, vocab_size: int = 0) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    config = _config(family, folder, vocab_size or VOCAB_SIZES[family])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    _set_generation_defaults(model.generation_config, family, config)
    model.save_pretrained(folder, safe_serialization=True)


def _config(family: str, folder: Path, vocab_size: int) -> Any:
    from tokenizers import Tokenizer
    from transformers import FalconConfig, LlamaConfig, MistralConfig

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    names = json.loads((folder / "tokenizer_config.json").read_text())
    common: dict[str, Any] = {
        "vocab_size": vocab_size,
        "hidden_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": MAX_POSITION_TOKENS,
        "initializer_range": WEIGHT_SPREAD,
        "bos_token_id": tokenizer.token_to_id(names.get("bos_token") or names["eos_token"]),
        "eos_token_id": tokenizer.token_to_id(names["eos_token"]),
        "pad_token_id": None,
        "tie_word_embeddings": False,
    }
    if family == "falcon":
        return FalconConfig(**common, new_decoder_architecture=True, num_kv_heads=2, bias=False, parallel_attn=True)
    common |= {"num_key_value_heads": 2, "intermediate_size": 256}
    if family == "mistral":
        return MistralConfig(**common, sliding_window=None)
    return LlamaConfig(**common)


def _set_generation_defaults(generation: Any, family: str, config: Any) -> None:
    """Set the generation defaults. As in the published models, LLaMA has sampling defaults and two end tokens; the
    other families have only their EOS.
    """
    generation.bos_token_id, generation.eos_token_id = config.bos_token_id, config.eos_token_id
    if family == "llama":
        end_of_text = config.vocab_size - len(tokenizer_kinds.LLAMA3_SPECIALS) + 1
        generation.eos_token_id = [end_of_text, config.eos_token_id]
        generation.do_sample, generation.temperature, generation.top_p = True, 0.6, 0.9
