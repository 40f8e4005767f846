"""Program that writes the models and scripts of the scenario: python -m loadtests.agents.prepare FILE FOLDER

FILE is a JSON object. Its keys are names of families (tool formats); each value maps keys of answers to the
texts of the answers. For each family, FOLDER/NAME gets `model` (tokenizer, template and config.json,
without weights), `bundle` and `scripts.json` (token ids of each answer). FOLDER/models.json lists the
models.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer

from loadtests.agents.formats import BY_NAME, Family
from loadtests.agents.scripted import MAX_MODEL_TOKENS
from tests.support import checkpoints, tokenizer_kinds

END, BEGIN_TURN = "<|im_end|>", "<|im_start|>"


def base_tokenizer() -> Tokenizer:
    """Return the byte-level tokenizer that all model families share, without the families' special tokens."""
    return tokenizer_kinds.llama3(checkpoints.VOCAB_SIZES["llama"])[0]


def write_model(family: Family, folder: Path, max_model_tokens: int = MAX_MODEL_TOKENS) -> Tokenizer:
    """Write tokenizer, chat template and config.json of a family; return the tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = base_tokenizer()
    tokenizer.post_processor = None
    controls = [BEGIN_TURN, END, *family.tokens]
    for token in controls:
        special = token[0] == "[" or token[1] == "|"  # as published; DeepSeek's tokens of tool calls are not special
        added = AddedToken(token, special=special, normalized=False)
        (tokenizer.add_special_tokens if special else tokenizer.add_tokens)([added])
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END,
        "pad_token": END,
        "model_max_length": max_model_tokens,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(names))
    (folder / "chat_template.jinja").write_text(family.template)
    end = tokenizer.token_to_id(END)
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": tokenizer.get_vocab_size(),
        "eos_token_id": end,
        "max_position_embeddings": max_model_tokens,
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "torch_dtype": "float32",
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": end}))
    return tokenizer


def script_ids(tokenizer: Tokenizer, texts: Mapping[str, str]) -> dict[str, list[int]]:
    """Return the token ids of each text, with the end token."""
    end = tokenizer.encode(END, add_special_tokens=False).ids
    return {key: [*tokenizer.encode(text, add_special_tokens=False).ids, *end] for key, text in texts.items()}


def write_family(name: str, texts: Mapping[str, str], folder: Path) -> dict[str, Any]:
    """Write the model, the bundle and the scripts of the model family `name`. Returns the family's entry in the input
    files of vllm_server.py and worker.py."""
    from cluster.worker.weights.tokenizer_bundle import build_bundle  # imports transformers

    family, model, bundle, scripts = BY_NAME[name], folder / "model", folder / "bundle", folder / "scripts.json"
    tokenizer = write_model(family, model)
    scripts.write_text(json.dumps(script_ids(tokenizer, texts)))
    build_bundle(model).save(bundle)
    paths = {"folder": str(model), "bundle": str(bundle), "scripts": str(scripts)}
    return {"name": name, "tools": family.tools, "reasoning": family.reasoning, **paths}


def main(file: Path, folder: Path) -> None:
    """Write the folder of each model family in `file`, then FOLDER/models.json with an entry for each family."""
    entries = [write_family(name, texts, folder / name) for name, texts in json.loads(file.read_text()).items()]
    written = folder / "models.json.part"
    written.write_text(json.dumps(entries))
    written.rename(folder / "models.json")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
