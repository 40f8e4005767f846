"""The repaired grammar compiler: it allows only valid JSON strings, and its other grammars are unchanged."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.worker.engine.vllm import repairs
from cluster.worker.engine.vllm.grammar import json_strings
from tests.support.grammar_samples import accepts, compiled, compiler

BOUNDED = {"type": "string", "minLength": 1, "maxLength": 400}
EMAIL = {"type": "string", "format": "email"}
NO_JSON = ((BOUNDED, '"a\tb"'), (BOUNDED, '"\x01"'), (EMAIL, r'"\"\x\"@b"'))
NAMES = {"type": "object", "properties": {'é[^"\\\r\n]': BOUNDED, "x": {"pattern": "^[^a]+$", "type": "string"}}}


def _tag(schema: object) -> str:
    content = {"type": "json_schema", "json_schema": schema}
    tag = {"type": "tag", "begin": "<call>", "content": content, "end": "</call>"}
    form = {"type": "triggered_tags", "triggers": ["<call>"], "tags": [tag]}
    return json.dumps({"type": "structural_tag", "format": form})


@pytest.mark.parametrize(("schema", "text"), NO_JSON)
def test_strings_are_json(schema: dict[str, object], text: str) -> None:
    """The stock compiler allows strings that are not valid JSON. The repaired compiler refuses such strings
    everywhere."""
    with pytest.raises(ValueError, match=r"Invalid"):
        json.loads(text)
    stock = compiler()._compiler
    assert accepts(stock.compile_json_schema(json.dumps(schema)), text)
    assert not accepts(compiled(schema), text)
    assert accepts(stock.compile_structural_tag(_tag(schema)), f"so: <call>{text}</call>")
    repaired = compiler().compile_structural_tag(_tag(schema))
    assert not accepts(repaired, f"so: <call>{text}</call>")
    assert accepts(repaired, 'so: <call>"a@b.c"</call> and <call>"d@e.f"</call>')


@pytest.mark.slow
@given(st.text(st.characters(exclude_characters='"\\', exclude_categories=["Cc", "Cs"]), max_size=8))
def test_other_strings_are_allowed_as_before(text: str) -> None:
    """A string with a length bound may have every character that needs no escape."""
    assert accepts(compiled(BOUNDED), f'"{text}"') == bool(text)


def test_names_and_expressions_are_kept() -> None:
    """The repaired compiler replaces a character class in the grammar's text. Property names and regular expressions
    that look like this character class stay unchanged."""
    grammar = compiled({**NAMES, "additionalProperties": {"type": "string", "maxLength": 2}})
    key = json.dumps(next(iter(NAMES["properties"])), ensure_ascii=False)
    assert accepts(grammar, f'{{{key}: "ab", "x": "bc", "y": "é"}}')
    assert not accepts(grammar, f'{{{key}: "a\t"}}')
    assert not accepts(grammar, '{"x": "a"}')


def test_other_json_is_kept() -> None:
    """The repair of JSON schemas rewrites only the format `email`, at any depth. Values that merely look like a schema
    are kept."""
    assert json_strings.with_plain_addresses('{"format": "date"}') == '{"format": "date"}'
    rewritten = json.loads(json_strings.with_plain_addresses(json.dumps({"a": [EMAIL], "const": EMAIL})))
    assert rewritten == {"a": [{"type": "string", "pattern": json_strings.EMAIL}], "const": EMAIL}


@pytest.mark.engine
def test_the_backend_of_vllm_has_the_repaired_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the repair "strings", vLLM's xgrammar backend refuses control characters in JSON strings. REPAIRS lists this
    repair."""
    from vllm.v1.structured_output.backend_types import StructuredOutputOptions
    from vllm.v1.structured_output.backend_xgrammar import XgrammarBackend

    def prepare(backend: Any) -> None:
        backend.disable_any_whitespace, backend.num_speculative_tokens = False, 0
        backend.compiler = compiler()._compiler

    assert "strings" in {repair.name for repair in repairs.REPAIRS}
    monkeypatch.setattr(XgrammarBackend, "__post_init__", prepare)
    json_strings.install()
    backend = XgrammarBackend(SimpleNamespace(), tokenizer=None, vocab_size=257)
    grammar = backend.compile_grammar(StructuredOutputOptions.JSON, json.dumps(BOUNDED))
    assert grammar.accept_tokens("r", list(b'"a'))
    assert not grammar.accept_tokens("r", [ord("\t")])
    tagged = backend.compile_grammar(StructuredOutputOptions.STRUCTURAL_TAG, _tag(BOUNDED))
    assert tagged.accept_tokens("r", list(b'<call>"a'))
    assert not tagged.accept_tokens("r", [ord("\t")])
