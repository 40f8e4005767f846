"""Choice of a model's renderer: which code of vLLM makes the prompts of its chats, and which parsers read its outputs.

Source: vLLM 0.32, `config/model.py` (modes by architecture), `tokenizers/registry.py` (Mistral's own tokenizers) and
`renderers/online_renderer.py` (harmony, whatever the tokenizer's mode).

There is one difference from vLLM. If a folder has both Mistral's own tokenizer and a Jinja template, a gateway renders
the template, because this needs no worker. `engine.tokenizer_mode: mistral` chooses Mistral's own renderer instead.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from types import MappingProxyType
from typing import Final, NamedTuple

HARMONY: Final = "harmony"
MISTRAL: Final = "mistral"
MODES: Final = (MISTRAL, "deepseek_v32", "deepseek_v4", "deepseek_v41")
"""Values of `engine.tokenizer_mode` whose renderers are served. They are the names of the renderers, too."""
_BY_ARCHITECTURE: Final = MappingProxyType(
    {
        "DeepseekV32ForCausalLM": "deepseek_v32",
        "DeepseekV4ForCausalLM": "deepseek_v4",
        "DeepseekV4ForConditionalGeneration": "deepseek_v4",
        "DeepseekV41ForCausalLM": "deepseek_v41",
    }
)


class FamilyParsers(NamedTuple):
    """Names of vLLM's parsers for the outputs of one model family."""

    tools: str
    reasoning: str


PARSERS: Final[Mapping[str, FamilyParsers]] = MappingProxyType(
    {
        HARMONY: FamilyParsers("openai", "openai_gptoss"),
        MISTRAL: FamilyParsers("mistral", "mistral"),
        "deepseek_v32": FamilyParsers("deepseek_v32", "deepseek_v3"),
        "deepseek_v4": FamilyParsers("deepseek_v4", "deepseek_v4"),
        "deepseek_v41": FamilyParsers("deepseek_v41", "deepseek_v41"),
    }
)
"""Parsers by renderer, for models whose entry names no parsers and which have no chat template to choose them by."""


def renderer_of(
    tokenizer_mode: str, model_type: str, architectures: Collection[str], *, has_template: bool, has_tekken: bool
) -> str:
    """Return the name of a model's renderer; "" if gateways render the model's chat template.

    `tokenizer_mode`: the catalog entry's `engine.tokenizer_mode`. `model_type`, `architectures`: from config.json.
    `has_template`: whether the folder has a chat template. `has_tekken`: whether the folder has Mistral's own
    tokenizer.
    """
    if model_type == "gpt_oss":
        return HARMONY
    mode = tokenizer_mode.lower()
    if mode != "auto":
        return mode if mode in MODES else ""
    if known := next((_BY_ARCHITECTURE[name] for name in architectures if name in _BY_ARCHITECTURE), ""):
        return known
    return MISTRAL if has_tekken and not has_template else ""


def tokenizer_mode_of(renderer: str) -> str:
    """Return vLLM's tokenizer mode for a renderer; "" if vLLM is to choose the mode itself."""
    return renderer if renderer in MODES else ""
