"""Model folders without weights, with tiny tokenizers, for models whose chats are rendered by vLLM's own code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.support.checkpoints import build_tokenizer

DEEPSEEK_MARKS = (
    *("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>", "<think>", "</think>"),
    *("｜DSML｜", "<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"),
)
ARCHITECTURES = {
    "deepseek_v32": ("deepseek_v32", "DeepseekV32ForCausalLM"),
    "deepseek_v4": ("deepseek_v4", "DeepseekV4ForCausalLM"),
    "deepseek_v41": ("deepseek_v41", "DeepseekV41ForCausalLM"),
    "mistral": ("mistral", "MistralForCausalLM"),
    "harmony": ("gpt_oss", "GptOssForCausalLM"),
}
"""`model_type` and architecture of a model of each renderer."""
TEKKEN_TOKENS, TEKKEN_SPECIALS = 3000, 1000


def build_rendered(renderer: str, folder: Path) -> Path:
    """Write the tokenizer and config.json of a model with this renderer into `folder`, and return `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    size = build_tekken(folder) if renderer == "mistral" else _build_deepseek(folder)
    model_type, architecture = ARCHITECTURES[renderer]
    config = {"model_type": model_type, "architectures": [architecture], "vocab_size": size}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def build_tekken(folder: Path) -> int:
    """Write a tekken.json with the first tokens of a published vocabulary into `folder`.

    Returns the new vocabulary's size.
    """
    import mistral_common

    source = Path(mistral_common.__file__).parent / "data" / "tekken_240911.json"
    table: dict[str, Any] = json.loads(source.read_text())
    table["vocab"] = table["vocab"][: TEKKEN_TOKENS - TEKKEN_SPECIALS]
    table["config"] |= {"num_vocab_tokens": len(table["vocab"]), "default_vocab_size": TEKKEN_TOKENS}
    table.pop("image", None)
    (folder / "tekken.json").write_text(json.dumps(table))
    return TEKKEN_TOKENS


def _build_deepseek(folder: Path) -> int:
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast.from_pretrained(str(build_tokenizer("llama", folder)))
    tokenizer.add_tokens(list(DEEPSEEK_MARKS), special_tokens=True)
    tokenizer.chat_template = None
    tokenizer.save_pretrained(str(folder))
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    return len(tokenizer)
