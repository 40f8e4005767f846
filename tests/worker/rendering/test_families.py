"""The choice of a model's renderer, and of its parsers."""

from __future__ import annotations

import json

import pytest

from cluster.config.engine import parsers
from cluster.wire.bundle import RENDERER, Bundle
from cluster.worker.parsing.families import chosen_parsers
from cluster.worker.parsing.port import ParserNames
from cluster.worker.rendering.families import MODES, PARSERS, renderer_of, tokenizer_mode_of


@pytest.mark.parametrize(
    ("mode", "model_type", "architecture", "has_template", "has_tekken", "renderer"),
    [
        ("auto", "llama", "LlamaForCausalLM", True, False, ""),
        ("auto", "llama", "LlamaForCausalLM", False, False, ""),
        ("auto", "deepseek_v32", "DeepseekV32ForCausalLM", False, False, "deepseek_v32"),
        ("auto", "deepseek_v32", "DeepseekV32ForCausalLM", True, False, "deepseek_v32"),
        ("auto", "deepseek_v4", "DeepseekV4ForConditionalGeneration", False, False, "deepseek_v4"),
        ("hf", "deepseek_v32", "DeepseekV32ForCausalLM", False, False, ""),
        ("DeepSeek_V32", "llama", "LlamaForCausalLM", True, False, "deepseek_v32"),
        ("auto", "mistral", "MistralForCausalLM", False, True, "mistral"),
        ("auto", "mistral", "MistralForCausalLM", True, True, ""),
        ("mistral", "mistral", "MistralForCausalLM", True, True, "mistral"),
        ("hf", "mistral", "MistralForCausalLM", False, True, ""),
        ("auto", "gpt_oss", "GptOssForCausalLM", True, False, "harmony"),
        ("hf", "gpt_oss", "GptOssForCausalLM", True, False, "harmony"),
    ],
)
def test_renderers(
    mode: str, model_type: str, architecture: str, has_template: bool, has_tekken: bool, renderer: str
) -> None:
    """A model gets the same renderer (vLLM's code that makes prompts of chats) as in vLLM's server. One case differs:
    if a folder with tekken.json also has a chat template, the template is used."""
    found = renderer_of(mode, model_type, [architecture], has_template=has_template, has_tekken=has_tekken)
    assert found == renderer


def test_parsers_of_renderers_exist() -> None:
    """Each renderer names parsers that the pinned vLLM has."""
    assert {"harmony", *MODES} == set(PARSERS)
    for names in PARSERS.values():
        assert names.tools in parsers("tool_call_parser")
        assert names.reasoning in parsers("reasoning_parser")


def test_a_renderer_chooses_the_parsers() -> None:
    """A model without a chat template gets its renderer's parsers. Parsers that the entry names take precedence."""
    bundle = Bundle({"tokenizer_config.json": json.dumps({RENDERER: "deepseek_v32"}).encode()})
    assert chosen_parsers(bundle, {})[0] == ParserNames("deepseek_v32", "deepseek_v3")
    assert chosen_parsers(bundle, {"reasoning_parser": "none"})[0] == ParserNames("deepseek_v32", "")


def test_tokenizer_modes() -> None:
    """The renderers `mistral` and `deepseek_v4` need the tokenizer mode of the same name. For `harmony` and for chat
    templates the mode is empty, so the engine chooses it."""
    assert [tokenizer_mode_of(name) for name in ("mistral", "deepseek_v4", "harmony", "")] == [
        *("mistral", "deepseek_v4"),
        *("", ""),
    ]
