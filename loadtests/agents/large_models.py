"""Program that writes the models of families.py as folders that vLLM and Headrace serve: tokenizer, template and
config.json, without weights.

python -m loadtests.agents.large_models FOLDER [FAMILY=TEXTS ...]

FOLDER/FAMILY gets `model` and `bundle`. If TEXTS is given, FOLDER/FAMILY also gets `scripts.json`. TEXTS is a JSON file
that maps keys to texts; `scripts.json` maps the same keys to the texts' token ids, each with the end token. The file
FOLDER/ready is written last.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer

from loadtests.agents import families
from loadtests.agents.prepare import script_ids

MAX_POSITION_TOKENS = 262_144
CALL_TOKENS = ("<tool_call>", "</tool_call>")
"""Tokens of Qwen's and Hermes' tool calls."""
ENDS = {"byte-level": "<|im_end|>", "metaspace": "</s>", "gpt-2": "<|endoftext|>"}
"""End tokens by family."""


def config(tokenizer: Tokenizer, end: int) -> dict[str, Any]:
    """Return the config.json of a small LLaMA with this tokenizer."""
    return {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": tokenizer.get_vocab_size(),
        "eos_token_id": end,
        "max_position_embeddings": MAX_POSITION_TOKENS,
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "torch_dtype": "float32",
    }


def write(family: str, folder: Path, texts: Mapping[str, str]) -> None:
    """Write the model and the bundle of a family. If there are `texts`, also write a file with the token ids of these
    texts."""
    from cluster.worker.weights.tokenizer_bundle import build_bundle  # imports transformers

    model = folder / "model"
    model.mkdir(parents=True)
    files = dict(families.bundle(family).files)
    tokenizer = Tokenizer.from_str(files["tokenizer.json"].decode())
    if family in families.HAS_TOOLS:
        tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in CALL_TOKENS])
    end = tokenizer.token_to_id(ENDS[family])
    assert end is not None, "families.py adds the end token"
    special = json.loads(files["tokenizer_config.json"])
    names: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": ENDS[family],
        "pad_token": ENDS[family],
    }
    names |= {"model_max_length": MAX_POSITION_TOKENS, "clean_up_tokenization_spaces": False}
    files |= {
        "tokenizer.json": tokenizer.to_str().encode(),
        "tokenizer_config.json": json.dumps(special | names).encode(),
        "config.json": json.dumps(config(tokenizer, end)).encode(),
        "generation_config.json": json.dumps({"eos_token_id": end}).encode(),
    }
    for name, data in files.items():
        (model / name).write_bytes(data)
    if texts:
        (folder / "scripts.json").write_text(json.dumps(script_ids(tokenizer, texts)))
    build_bundle(model).save(folder / "bundle")


def main(folder: Path, wanted: Mapping[str, str]) -> None:
    """Write all families, and then the file `ready`."""
    for family, texts in wanted.items():
        write(family, folder / family, json.loads(Path(texts).read_text()) if texts else {})
    (folder / "ready").write_text("")


if __name__ == "__main__":
    main(Path(sys.argv[1]), dict(word.split("=", 1) for word in sys.argv[2:]))
