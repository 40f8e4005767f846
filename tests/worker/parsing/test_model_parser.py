"""The output parser that a model gets when it is opened."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from cluster.api.types import EngineInfo, ModelSpec
from cluster.worker.open_model import open_model
from cluster.worker.parsing.model_parser import model_parser, with_parsers
from cluster.worker.parsing.port import ParserNames
from cluster.worker.settings import ReplicaSettings
from cluster.worker.weights.tokenizer_bundle import build_bundle
from tests.support.checkpoints import build_tokenizer

pytestmark = pytest.mark.engine

HERMES_TEMPLATE = "{% if tools %}<tool_call>{% endif %}{% for message in messages %}{{ message.content }}{% endfor %}"


def model(folder: Path, tmp_path: Path, model_type: str = "llama", template: str = HERMES_TEMPLATE) -> Path:
    """Return a copy of a model folder with this model type and chat template."""
    copy = Path(shutil.copytree(folder, tmp_path / "model"))
    (copy / "config.json").write_text(json.dumps({"model_type": model_type, "vocab_size": 2000}))
    (copy / "chat_template.jinja").write_text(template)
    return copy


def names_of(folder: Path, engine: dict[str, Any]) -> ParserNames | None:
    """Return the parsers that a model in `folder` gets."""
    parser = model_parser(ModelSpec("m", str(folder), engine=engine), folder, build_bundle(folder))
    return None if parser is None else parser.names


@pytest.mark.parametrize(
    ("engine", "names"),
    [
        ({}, ParserNames("hermes")),
        ({"tool_call_parser": "kimi_k2"}, ParserNames("kimi_k2")),
        ({"reasoning_parser": "deepseek_r1"}, ParserNames("hermes", "deepseek_r1")),
        ({"tool_call_parser": "none"}, None),
    ],
)
def test_the_family_and_the_entry_choose_the_parsers(
    folder: Path, tmp_path: Path, engine: dict[str, Any], names: ParserNames | None
) -> None:
    """A model gets the parsers that its catalog entry names. If the entry names none, the model gets the parsers of its
    family."""
    assert names_of(model(folder, tmp_path), engine) == names


def test_a_parser_must_accept_the_tokenizer(tmp_path: Path) -> None:
    """A parser is not chosen for a model whose tokenizer lacks the parser's tokens. If the catalog entry of the model
    names such a parser, this is an error."""
    plain = build_tokenizer("llama", tmp_path / "plain")
    (plain / "config.json").write_text("{}")
    mistral = model(plain, tmp_path, "mistral", "[TOOL_CALLS]")
    assert names_of(mistral, {}) is None
    with pytest.raises(ValueError, match=r"engine\.tool_call_parser mistral.* of '.*/model'"):
        names_of(mistral, {"tool_call_parser": "mistral"})
    with pytest.raises(ValueError, match=r"engine\.reasoning_parser deepseek_r1"):
        names_of(mistral, {"reasoning_parser": "deepseek_r1"})


@pytest.mark.parametrize(("engine", "words"), [({}, ()), ({"tool_call_parser": "hermes"}, ("tools:hermes",))])
def test_a_simulated_engine_has_parsers_only_on_request(
    folder: Path, tmp_path: Path, engine: dict[str, Any], words: tuple[str, ...]
) -> None:
    """A simulated engine has only the parsers that its entry names, and its capabilities list them."""
    source = f"sim://{model(folder, tmp_path)}?decode_ms=1"
    opened = open_model(ReplicaSettings(ModelSpec("m", source, engine=engine), "c"))
    info = with_parsers(EngineInfo("sim", "sim", "1", 1, 1, 1, 1, 1, 1, capabilities=("x",)), opened.parser)
    assert info.capabilities == ("x", *words)
