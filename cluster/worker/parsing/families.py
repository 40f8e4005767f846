"""Choice of vLLM's parsers for tool calls and reasoning, from a model's config.json and chat template.

The model family alone is not enough. Fine-tuned models of one architecture write tool calls in different formats, and
vLLM's reasoning parsers take every output for reasoning until the mark that ends the reasoning. So a parser is chosen
only if the chat template contains the parser's marks. A model that matches no row of the tables gets no parser.
`engine.tool_call_parser` and `engine.reasoning_parser` override the choice.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cluster.config.engine import NO_PARSER, PARSER_KEYS
from cluster.wire.bundle import RENDERER, Bundle
from cluster.worker.parsing.port import ParserNames
from cluster.worker.rendering.families import PARSERS


@dataclass(frozen=True, slots=True)
class _Row:
    """A parser, and the regular expressions that a model's `model_type` and chat template must match. "" matches
    everything."""

    parser: str
    model_type: str
    template: str


_QWEN = r"qwen(2|3)(_?5|_?next|_?vl|_moe|_5_moe|_omni)*(_text)?"
_LLAMA = r"llama|mllama|mllama_text_model"
_MISTRAL = r"(m|min|dev)istral\d*|mixtral|pixtral"

TOOLS = (
    _Row("kimi_k2", "kimi_k2|deepseek_v3", r"<\|tool_calls_section_begin\|>"),
    _Row("deepseek_v31", "deepseek_v3", r"<｜tool▁calls▁begin｜>(?s:.*)thinking|thinking(?s:.*)<｜tool▁calls▁begin｜>"),
    _Row("deepseek_v3", "deepseek_v3", "<｜tool▁calls▁begin｜>"),
    _Row("deepseek_v32", "deepseek_v32", "｜DSML｜"),
    _Row("glm45", "glm4_moe.*", "<arg_key>"),
    _Row("granite4", "granitemoehybrid", "<tool_call>"),
    _Row("granite", "granite.*", r"<\|tool_call\|>"),
    _Row("openai", "gpt_oss", ""),
    _Row("minimax_m2", "minimax(_m2)?", "<minimax:tool_call>|minimax:tool_call"),
    _Row("phi4_mini_json", "phi3|phi4", r"<\|tool\|>"),
    _Row("internlm", "internlm2", r"<\|plugin\|>"),
    _Row("jamba", "jamba", "<tool_calls>"),
    _Row("hunyuan_a13b", "hunyuan.*", "<tool_calls>"),
    _Row("ernie45", "ernie4_5.*", "<tool_call>"),
    _Row("seed_oss", "seed_oss", "<seed:tool_call>"),
    _Row("step3p5", "step3p5", "<tool_call>"),
    _Row("step3", "step3.*", "<｜tool_calls_begin｜>"),
    _Row("olmo3", "olmo3", "<function_calls>"),
    _Row("lfm2", "lfm2.*", r"<\|tool_call_start\|>"),
    _Row("apertus", "apertus", r"<\|tools_prefix\|>"),
    _Row("longcat", "longcat.*", "<longcat_tool_call>"),
    _Row("mimo", "mimo.*", "<tool_call>"),
    _Row("functiongemma", "gemma3.*", "<start_function_call>"),
    _Row("gemma4", "gemma4.*", r"<\|tool_call>"),
    _Row("mistral", _MISTRAL, r"\[TOOL_CALLS\]"),
    _Row("llama4_pythonic", "llama4.*", "ipython|python"),
    _Row("qwen3_coder", f"{_QWEN}|nemotron_h", "<function="),
    _Row("hermes", f"{_QWEN}|{_LLAMA}|{_MISTRAL}|smollm3|nemotron_h", "<tool_call>"),
    _Row("llama3_json", _LLAMA, r"Environment: ipython|<\|python_tag\|>"),
)
"""Parsers of tool calls. The first row that matches decides."""

_OPENED = r"<think>\\n|<think>['\"]|<think>\n"
"""Text of a template whose prompts end with the mark that begins the reasoning."""
REASONING = (
    _Row(
        "kimi_k2", "kimi_k2|deepseek_v3", r"<\|tool_calls_section_begin\|>(?s:.*)<think>|<think>(?s:.*)<\|im_middle\|>"
    ),
    _Row("deepseek_v3", "deepseek_v3", r"\bthinking\b"),
    _Row("deepseek_r1", "deepseek_v3|qwen2|llama", r"<｜Assistant｜><think>"),
    _Row("glm45", "glm4_moe.*", "<think>"),
    _Row("openai_gptoss", "gpt_oss", ""),
    _Row("minimax_m2", "minimax(_m2)?", "<think>"),
    _Row("hunyuan_a13b", "hunyuan.*", "<think>"),
    _Row("ernie45", "ernie4_5.*", "<think>"),
    _Row("seed_oss", "seed_oss", "<seed:think>"),
    _Row("step3p5", "step3p5", "<think>"),
    _Row("step3", "step3.*", "<think>"),
    _Row("olmo3", "olmo3", _OPENED),
    _Row("mimo", "mimo.*", "enable_thinking"),
    _Row("gemma4", "gemma4.*", "enable_thinking"),
    _Row("granite", "granite", r"\bthinking\b"),
    _Row("qwen3", r"qwen3.*", rf"enable_thinking|assistant\\n(?:{_OPENED})"),
    _Row("deepseek_r1", "qwen2", rf"assistant\\n(?:{_OPENED})"),
)
"""Parsers of reasoning. The first row that matches decides."""


def family_parsers(model_type: str, template: str) -> ParserNames:
    """Return the parsers for a model, chosen by its family. `template`: the source of the model's chat template."""
    return ParserNames(_match(TOOLS, model_type, template), _match(REASONING, model_type, template))


def _match(rows: tuple[_Row, ...], model_type: str, template: str) -> str:
    for row in rows:
        if re.fullmatch(row.model_type, model_type) and template and re.search(row.template, template):
            return row.parser
    return ""


def _renderer_parsers(bundle: Bundle) -> ParserNames | None:
    """Return the parsers that belong to the bundle's renderer; None if gateways render the model's chat template."""
    parsers = PARSERS.get(str(json.loads(bundle.files.get("tokenizer_config.json", b"{}")).get(RENDERER, "")))
    return None if parsers is None else ParserNames(*parsers)


def chosen_parsers(bundle: Bundle, engine: Mapping[str, Any]) -> tuple[ParserNames, frozenset[str]]:
    """Return two values: the names of a model's parsers, and the keys among PARSER_KEYS that the `engine:` section of
    the catalog entry sets."""
    given = {key: str(engine[key]) for key in PARSER_KEYS if engine.get(key)}
    config = json.loads(bundle.files.get("config.json", b"{}"))
    template = bundle.files.get("chat_template.jinja", b"").decode(errors="replace")
    template = bundle.files.get("chat_template.tool_use.jinja", b"").decode(errors="replace") or template
    family = _renderer_parsers(bundle) or family_parsers(str(config.get("model_type", "")), template)
    names = [
        given.get(key, default) for key, default in zip(PARSER_KEYS, (family.tools, family.reasoning), strict=True)
    ]
    tools, reasoning = ("" if name == NO_PARSER else name for name in names)
    return ParserNames(tools, reasoning), frozenset(given)
