"""The parsers that a model gets, chosen by its family and its chat template."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from cluster.config.engine import parsers
from cluster.wire.bundle import Bundle
from cluster.worker.parsing.families import REASONING, TOOLS, chosen_parsers, family_parsers
from cluster.worker.parsing.port import ParserNames
from tests.worker.parsing.formats import FORMATS

TEMPLATES = Path(__file__).resolve().parents[2] / "data" / "chat_templates"
API = Path(__file__).resolve().parents[3] / "docs" / "api.md"


@pytest.mark.parametrize(
    ("model_type", "template", "tools", "reasoning"),
    [
        ("qwen2", "qwen2.5", "hermes", ""),
        ("qwen3", "qwen3-training", "hermes", "qwen3"),
        ("qwen3_moe", "qwen3-training", "hermes", "qwen3"),
        ("qwen3_5", "qwen3.5", "qwen3_coder", "qwen3"),
        ("llama", "hermes-2-pro-tool-use", "hermes", ""),
        ("mistral", "mistral-nemo", "mistral", ""),
        ("mistral3", "mistral-small-3.2", "mistral", ""),
        ("glm4_moe", "glm-4.6", "glm45", "glm45"),
        ("granite", "granite-3.3", "granite", "granite"),
        ("gpt_oss", "gpt-oss", "openai", "openai_gptoss"),
        ("llama", "chatml", "", ""),
        ("phi3", "phi3-training", "", ""),
        ("unknown", "qwen2.5", "", ""),
    ],
)
def test_a_family_has_the_parsers_that_its_template_writes(
    model_type: str, template: str, tools: str, reasoning: str
) -> None:
    """A model gets its family's parser if the chat template contains the parser's marks, otherwise no parser."""
    source = (TEMPLATES / f"{template}.jinja").read_text()
    assert family_parsers(model_type, source) == ParserNames(tools, reasoning)
    assert family_parsers(model_type, "") == ParserNames()


def test_every_row_names_a_parser_of_the_pinned_vllm() -> None:
    """The table of families names only parsers that vLLM has."""
    assert {row.parser for row in TOOLS} <= set(parsers("tool_call_parser"))
    assert {row.parser for row in REASONING} <= set(parsers("reasoning_parser"))


@pytest.mark.parametrize(
    ("engine", "names", "given"),
    [
        ({}, ParserNames("hermes", "qwen3"), set()),
        ({"tool_call_parser": "qwen3_coder"}, ParserNames("qwen3_coder", "qwen3"), {"tool_call_parser"}),
        ({"reasoning_parser": "none"}, ParserNames("hermes", ""), {"reasoning_parser"}),
        (
            {"tool_call_parser": "none", "reasoning_parser": "none"},
            ParserNames(),
            {"tool_call_parser", "reasoning_parser"},
        ),
    ],
)
def test_the_entry_overrides_the_family(engine: dict[str, Any], names: ParserNames, given: set[str]) -> None:
    """`engine.tool_call_parser` and `engine.reasoning_parser` replace the family's parsers. The value `none` removes
    them."""
    template = (TEMPLATES / "qwen3-training.jinja").read_bytes()
    bundle = Bundle({"config.json": json.dumps({"model_type": "qwen3"}).encode(), "chat_template.jinja": template})
    assert chosen_parsers(bundle, engine) == (names, frozenset(given))


def test_the_capabilities_name_the_parsers() -> None:
    """A worker's capabilities name its parsers. A worker without parsers has no such capability."""
    assert ParserNames("hermes", "qwen3").capabilities == ("tools:hermes", "reasoning:qwen3")
    assert ParserNames("", "qwen3").capabilities == ("reasoning:qwen3",)
    assert ParserNames().capabilities == ()


@pytest.mark.parametrize(("row", "kind", "least"), [("tool calls", "tools", 15), ("reasoning", "reasoning", 5)])
def test_the_docs_list_the_tested_parsers(row: str, kind: str, least: int) -> None:
    """docs/api.md lists exactly the parsers that test_sessions.py tests and whose streamed calls are valid."""
    (line,) = re.findall(rf"^\| {row} \| (`.*) \|$", API.read_text(), re.MULTILINE)
    tested = {getattr(form, kind) for form in FORMATS if form.is_right} - {""}
    assert re.findall(r"`(\w+)`", line) == sorted(tested)
    assert len(tested) >= least
