"""JSON-schema keywords: each is either refused by name or enforced by the compiled grammar."""

from __future__ import annotations

import contextlib
import json
import random
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.api.ports import EngineRefused
from cluster.api.types import Grammar
from cluster.worker.engine.vllm.grammar.grammars import check_grammar
from cluster.worker.engine.vllm.grammar.schema_keywords import KEYWORDS, check_schema
from tests.support.cpu import cpu_within
from tests.support.grammar_samples import accepts, compiled, problem, samples
from tests.support.schemas import SchemaGenerator

FIELD = "tools[3].function.parameters"

REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"not": {"type": "string"}}, "`not` at /not is not enforced"),
    *(({word: {"type": "string"}}, f"`{word}` at /{word} is not enforced") for word in ("if", "then", "else")),
    ({"type": "object", "dependentRequired": {"a": ["b"]}}, "`dependentRequired` at /dependentRequired"),
    ({"type": "object", "dependentSchemas": {"a": {}}}, "`dependentSchemas` at /dependentSchemas"),
    ({"type": "object", "dependencies": {"a": ["b"]}}, "`dependencies` at /dependencies"),
    ({"allOf": [{"type": "string"}, {"enum": ["a"]}]}, "`allOf` at /allOf has several members"),
    ({"allOf": []}, "`allOf` at /allOf must be a list that is not empty"),
    ({"anyOf": []}, "`anyOf` at /anyOf must be a list that is not empty"),
    ({"enum": []}, "`enum` at /enum must be a list that is not empty"),
    ({"oneOf": [{"type": "number"}, {"type": "integer"}]}, "`oneOf` at /oneOf has members that may overlap"),
    ({"oneOf": [{"type": "integer"}, {"properties": {}}]}, "may overlap"),
    ({"oneOf": [{"const": 1}, {"enum": [1.0, 2]}]}, "may overlap"),
    ({"type": "string", "allOf": [{"maxLength": 1}]}, "`type` at /type is ignored beside `allOf`"),
    ({"anyOf": [{"maxLength": 1}]}, "`maxLength` at /anyOf/0/maxLength .* add .type.: .string."),
    ({"anyOf": [False]}, "`false` at /anyOf/0 allows no value"),
    ({"type": "string", "anyOf": [{"type": "string"}, {"type": "null"}]}, "`type` at /type is ignored beside `anyOf`"),
    ({"properties": {"a": {}}, "anyOf": [{"type": "object"}]}, "`properties` at /properties is ignored beside `anyOf`"),
    ({"type": "string", "enum": ["a", 1]}, "`type` at /type is ignored beside `enum`"),
    ({"enum": ["a", "b"], "maxLength": 1}, "`maxLength` at /maxLength is ignored beside `enum`"),
    ({"const": "a", "enum": ["b"]}, "`enum` at /enum does not have the value of `const`"),
    ({"const": 1 << 64}, "`const` at /const has an integer of more than 64 bits"),
    ({"$ref": "#/$defs/a", "maxLength": 1, "$defs": {"a": {"type": "string"}}}, "ignored beside `.ref`"),
    *(({"$ref": ref}, "is not followed") for ref in ("http://x/y", "x.json#/a", "#a", "", "/$defs/a")),
    *(({"$ref": ref}, "an empty part or an escape") for ref in ("#/", "#/a//b", "#/a~1b", "#/a%25")),
    ({"$ref": "#/$defs/a"}, "refers to nothing"),
    ({"$ref": "#"}, "a part of itself"),
    ({"$defs": {"a": {"anyOf": [{"$ref": "#/$defs/a"}]}}, "$ref": "#/$defs/a"}, "a part of itself"),
    ({"$dynamicRef": "#a"}, "`.dynamicRef` at /.dynamicRef is not enforced"),
    ({"$recursiveRef": "#"}, "`.recursiveRef` at"),
    ({"type": "nope"}, "`type` at /type must be one or more of null"),
    ({"type": []}, "`type` at /type must be one or more of null"),
    *(
        ({word: 1}, f"`{word}` at /{word} is ignored in a schema without")
        for word in ("minimum", "maximum", "minLength")
    ),
    *(({word: 1}, f"`{word}` at /{word} is ignored in a schema without") for word in ("maxLength", "minItems")),
    ({"required": ["a"]}, "`required` at /required is ignored in a schema without `type`"),
    ({"pattern": "a"}, "`pattern` at /pattern is ignored in a schema without `type`"),
    ({"type": "string", "format": "idn-email"}, "`format` at /format is 'idn-email', which is not enforced"),
    ({"type": "string", "format": "json-pointer"}, "is not enforced"),
    ({"type": "string", "pattern": "(?=a)a"}, "uses look-ahead"),
    ({"type": "string", "pattern": "a+", "maxLength": 1}, "`pattern` beside `minLength` or `maxLength`"),
    ({"type": "string", "format": "date", "minLength": 1}, "`format` beside `minLength` or `maxLength`"),
    ({"type": "string", "format": "date", "pattern": "2.*"}, "of which only `format` is enforced"),
    *(
        ({"type": "string", word: bad}, "must be a whole number")
        for word in ("minLength", "maxLength")
        for bad in (-1, 1.5)
    ),
    ({"type": "integer", "minimum": 1.5}, "must be a whole number"),
    ({"type": "integer", "exclusiveMinimum": True}, "must be a number"),
    ({"type": "number", "maximum": 1e30}, "must be between"),
    ({"type": "integer", "maximum": 10**400}, "must be between"),
    ({"type": "number", "minimum": -(10**400)}, "must be between"),
    *(({"type": name, "multipleOf": 2}, "`multipleOf` at /multipleOf") for name in ("integer", "number")),
    *(({"type": "array", word: {}}, f"`{word}` at /{word}") for word in ("contains", "additionalItems", "uniqueItems")),
    *(({"type": "array", word: 1}, f"`{word}` at /{word}") for word in ("minContains", "maxContains")),
    ({"type": "array", "items": [{}]}, "use `prefixItems`"),
    ({"type": "array", "prefixItems": [True]}, "must be a list of JSON objects"),
    ({"type": "object", "required": ["z"]}, "has 'z' in `required`"),
    ({"type": "object", "patternProperties": {"^a": {}, "b$": {}}}, "several expressions"),
    ({"type": "object", "patternProperties": {"(?!a)": {}}}, "uses look-ahead"),
    ({"type": "object", "patternProperties": {"a": {}}, "properties": {}}, "`patternProperties` beside `properties`"),
    ({"type": "object", "propertyNames": {"minLength": 1}, "properties": {}}, "`propertyNames` beside `properties`"),
    ({"type": "object", "propertyNames": {"pattern": "a"}, "additionalProperties": False}, "leave the other out"),
    ({"type": "object", "propertyNames": {}}, "`propertyNames` at /propertyNames is empty"),
    ({"type": "object", "propertyNames": True}, "`propertyNames` at /propertyNames must be a JSON object"),
    ({"type": "object", "propertyNames": {"enum": [1]}}, "`propertyNames` at /propertyNames must have strings alone"),
    ({"type": "object", "propertyNames": {"anyOf": [{}]}}, "`propertyNames` at /propertyNames has `anyOf`"),
    ({"type": "object", "additionalProperties": True, "minProperties": 2}, "`minProperties` above 1"),
    ({"properties": {"é": {"type": "null"}}, "additionalProperties": True}, "has the property 'é' beside"),
    ({"properties": {f"p{i}": {} for i in range(65)}, "maxProperties": 9}, "counts more than 64 properties"),
    ({"properties": {"a": False}}, "`false` at /properties/a"),
    ({"properties": {"a": 5}}, "/properties/a must be a schema"),
    ({"properties": []}, "`properties` at /properties must be a JSON object"),
    ({"properties": {"a/b~": {"items": {"not": {}}}}}, "`not` at /properties/a~1b~0/items/not"),
    ({"$defs": {"a": {"type": "string", "not": {}}}, "items": {"$ref": "#/$defs/a"}}, "`not` at #/.defs/a/not"),
]
"""Schemas that are refused, each with an expression that the message must match."""

CLOSED = {"additionalProperties": False}
TREE = {"type": "object", "properties": {"n": {"anyOf": [{"$ref": "#"}, {"type": "null"}]}}, "required": ["n"]}
TAGGED = [
    {"type": "object", "properties": {"kind": {"const": name}, "x": {"type": kind}}, "required": ["kind"], **CLOSED}
    for name, kind in (("a", "integer"), ("b", "null"))
]
ENFORCED: dict[str, list[dict[str, Any]]] = {
    "type": [*({"type": name} for name in ("integer", "object", "array")), {"type": ["string", "null"]}],
    "enum": [{"enum": ["a", 1, None, True, [], {"é": 0.5}]}, {"type": "string", "enum": ["a", "b"]}],
    "const": [{"const": {"b": [1, "\u0000é/"]}}, {"const": "a", "enum": ["a"], "type": "string"}, {"const": 1e300}],
    "anyOf": [{"anyOf": [{"type": "string", "maxLength": 2}, {"type": "null"}], "type": ["string", "null"]}],
    "oneOf": [
        {"oneOf": [{"type": "string", "maxLength": 2}, {"enum": [None, 4]}]},
        {"oneOf": TAGGED, "discriminator": {"propertyName": "kind"}},
        {"oneOf": [{"$ref": "#/$defs/0"}, {"$ref": "#/$defs/1"}], "$defs": dict(zip("01", TAGGED, strict=True))},
    ],
    "allOf": [{"allOf": [{"$ref": "#/$defs/a"}], "title": "t", "$defs": {"a": {"type": "integer"}}}],
    "$ref": [TREE, {"items": {"$ref": "#/$defs/a", "description": "d"}, "$defs": {"a": {"type": "integer"}}}],
    "minLength": [{"type": "string", "minLength": 2}],
    "maxLength": [{"type": "string", "maxLength": 3}, {"type": "string", "minLength": 1, "maxLength": 200}],
    "pattern": [{"type": "string", "pattern": text} for text in ("^[a-z]+[^b]{0,3}$", "a|b", r"\w\.\u00e9", "(?:x.)*")],
    "format": [{"type": "string", "format": "email"}],
    "minimum": [{"type": "integer", "minimum": -7}, {"type": "number", "minimum": 0.25}],
    "maximum": [{"type": "integer", "maximum": 120}, {"type": "number", "maximum": -1.5}],
    "exclusiveMinimum": [{"type": ["integer", "null"], "exclusiveMinimum": 5, "exclusiveMaximum": 30}],
    "exclusiveMaximum": [{"type": "number", "exclusiveMinimum": -0.5, "exclusiveMaximum": 0.125}],
    "items": [{"type": "array", "items": {"type": "integer"}}, {"items": False}],
    "prefixItems": [
        {"prefixItems": [{"type": "integer"}, {"const": "a"}]},
        {"prefixItems": [{}], "items": {"const": 1}},
    ],
    "unevaluatedItems": [{"prefixItems": [{"type": "null"}], "unevaluatedItems": {"type": "integer"}}],
    "minItems": [{"items": {"type": "integer"}, "minItems": 2}],
    "maxItems": [{"type": "array", "items": True, "maxItems": 2}],
    "properties": [{"properties": {"a": {"type": "integer"}, 'b"\n': {"type": "null"}}}],
    "required": [{"properties": {"a": {"type": "integer"}, "b": {}}, "required": ["b"]}],
    "additionalProperties": [
        {"properties": {"a": {"type": "integer"}}, **CLOSED},
        {"additionalProperties": {"type": "integer"}, "maxProperties": 2},
    ],
    "unevaluatedProperties": [{"type": "object", "unevaluatedProperties": {"type": "null"}}],
    "patternProperties": [{"type": "object", "patternProperties": {"^a": {"type": "integer"}}}],
    "propertyNames": [
        {"type": "object", "propertyNames": {"maxLength": 2}},
        {"type": "object", "propertyNames": {"enum": ["é"]}},
    ],
    "minProperties": [{"properties": {"a": {}, "b": {"type": "null"}, "c": {"const": 1}}, "minProperties": 2}],
    "maxProperties": [{"properties": {"a": {}, "b": {"type": "null"}}, "required": ["b"], "maxProperties": 1}],
}
"""Schemas whose outputs are valid, by the keyword that each shows to be enforced."""


@pytest.mark.parametrize(("schema", "says"), REFUSED, ids=lambda value: json.dumps(value)[:60])
def test_what_is_not_enforced_is_refused_by_name(schema: dict[str, object], says: str) -> None:
    """The refusal of a schema names the caller's field, the keyword, its JSON pointer and a remedy."""
    with pytest.raises(EngineRefused, match=says) as error:
        check_schema(FIELD, schema)
    assert (error.value.field, error.value.reason) == (FIELD, "INVALID_FIELD")
    assert error.value.message.startswith(f"{FIELD}: ")
    with pytest.raises(EngineRefused) as error:
        check_grammar(Grammar("json_schema", json.dumps(schema)))
    assert error.value.field == "response_format.json_schema"


@pytest.mark.parametrize("keyword", sorted(ENFORCED))
def test_outputs_are_valid_by_the_schema(keyword: str) -> None:
    """Random outputs of an accepted schema's grammar are JSON and valid by the schema."""
    for schema in ENFORCED[keyword]:
        assert keyword in json.dumps(schema)
        check_schema(FIELD, schema)
        outputs = list(samples(compiled(schema), seed=1, count=25, longest=150))
        assert outputs, schema
        assert not [(output, why) for output in outputs if (why := problem(schema, output))], schema


def _standard_keywords() -> Iterator[str]:
    registry = pytest.importorskip("jsonschema_specifications").REGISTRY
    assertions = ("applicator", "core", "unevaluated", "validation", "format-assertion")
    for word in assertions:
        uri = f"https://json-schema.org/draft/2020-12/meta/{word}"
        yield from registry.contents(uri)["properties"]


def test_every_keyword_of_the_standard_is_refused_or_enforced() -> None:
    """For each keyword of JSON Schema 2020-12 that constrains values, a test in this file shows that it is either
    enforced or refused. Keywords that only identify or describe a schema are left out."""
    identifiers = {"$id", "$schema", "$anchor", "$dynamicAnchor", "$vocabulary", "$comment", "$defs"}
    refused = {keyword for schema, says in REFUSED for keyword in KEYWORDS if f"`{keyword.replace('$', '.')}`" in says}
    standard = set(_standard_keywords()) - identifiers
    assert len(standard) > 30
    assert standard - set(ENFORCED) - refused == set()
    assert standard <= set(KEYWORDS)


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 1 << 32))
def test_any_accepted_schema_is_enforced(seed: int) -> None:
    """If a random schema is accepted and compiles, every output that its grammar allows conforms to the schema."""
    schema = SchemaGenerator(random.Random(seed)).root()
    try:
        check_schema(FIELD, schema)
        grammar = compiled(schema)
    except (EngineRefused, RuntimeError):
        return
    for output in samples(grammar, seed, count=5):
        assert not problem(schema, output), (schema, output)


def _nested(children: st.SearchStrategy[object]) -> st.SearchStrategy[object]:
    names = st.sampled_from((*KEYWORDS, "a", "#"))
    return st.lists(children, max_size=3) | st.dictionaries(names, children, max_size=3)


@settings(max_examples=40)
@given(st.recursive(st.none() | st.booleans() | st.integers() | st.text(max_size=3), _nested, max_leaves=20))
def test_any_json_gets_an_answer(value: object) -> None:
    """A schema with any JSON value for a keyword is either accepted or refused with EngineRefused. No other error is
    raised."""
    for keyword in KEYWORDS:
        for schema in ({keyword: value}, {"type": ["object", "array", "string", "number"], keyword: value}):
            with contextlib.suppress(EngineRefused):
                check_schema(FIELD, schema)


def test_annotations_are_accepted() -> None:
    """Keywords that constrain nothing are accepted, also unknown ones, even if they contain the name of a refused
    keyword."""
    notes = {
        "title": "t",
        "default": {"not": {}},
        "examples": [1],
        "deprecated": True,
        "x-note": {"if": 1},
        "nullable": 1,
    }
    check_schema(FIELD, {"type": "string", **notes, "contentEncoding": "base64", "$comment": "", "minimum": 3})
    check_schema(FIELD, {"properties": {"not": {"type": "string"}, "if": {"$ref": "#/$defs/if"}}, "$defs": {"if": {}}})
    check_schema(
        FIELD, {"$ref": "#/$defs/a", **notes, "$defs": {"a": {"type": "integer", "format": "int32"}, "b": {"not": {}}}}
    )


def _chain(length: int) -> dict[str, object]:
    steps: dict[str, object] = {f"a{i}": {"anyOf": [{"$ref": f"#/$defs/a{i + 1}"}] * 2} for i in range(length)}
    return {"$ref": "#/$defs/a0", "$defs": {**steps, f"a{length}": {"type": "null"}}}


@pytest.mark.parametrize(
    ("schema", "says"),
    [
        ({"items": {"items": {}}} | {"enum": [list(range(60_000))]}, "more than 50000 values"),
        (_chain(1000), "follow each other"),
        ({"oneOf": [{"const": i} for i in range(20_000)]}, ""),
        (
            {"properties": {f"p{i}": {"$ref": "#/$defs/a"} for i in range(8000)}, "$defs": {"a": _chain(20)["$defs"]}},
            "",
        ),
    ],
)
def test_large_schemas_take_bounded_time(schema: dict[str, object], says: str) -> None:
    """Schemas with tens of thousands of values, or with references that fan out, are checked within two seconds."""
    with cpu_within(2.0):
        if says:
            with pytest.raises(EngineRefused, match=says):
                check_schema(FIELD, schema)
        else:
            check_schema(FIELD, schema)


def test_deep_schemas_are_refused() -> None:
    """A schema that is nested deeper than vLLM allows is refused, at any recursion limit of Python."""
    for depth in (64, 300, 900):
        schema: dict[str, object] = {"type": "null"}
        for _ in range(depth):
            schema = {"items": schema}
        with pytest.raises(EngineRefused, match="nested more than 64 deep"):
            check_schema(FIELD, schema)
        with pytest.raises(EngineRefused, match=r"nested more than 64 deep|not JSON"):
            check_grammar(Grammar("json_schema", json.dumps(schema)))


FORMATS = {
    "date": ("2024-02-29", "2024-13-01"),
    "time": ("23:59:60Z", "24:00:00Z"),
    "date-time": ("2024-01-01T00:00:00.5+01:00", "2024-01-01 00:00:00"),
    "duration": ("P1Y2M3DT4H", "P"),
    "email": ("a.b+c@x-y.org", r"\"a\"@b"),
    "hostname": ("a-b.example", "-a"),
    "ipv4": ("10.0.0.255", "10.0.0.256"),
    "ipv6": ("2001:db8::1", "1:2:3"),
    "uri": ("https://a.b/c?d#e", "//a"),
    "uri-reference": ("../a?b", "a b"),
    "uri-template": ("/a/{b}", "{"),
    "uuid": ("123e4567-e89b-12d3-a456-426614174000", "123e4567"),
}


@pytest.mark.parametrize("name", sorted(FORMATS))
def test_formats_have_their_form(name: str) -> None:
    """Outputs of a schema with a `format` are JSON strings of that format."""
    schema = {"type": "string", "format": name}
    check_schema(FIELD, schema)
    grammar = compiled(schema)
    good, bad = FORMATS[name]
    assert accepts(grammar, f'"{good}"')
    assert not accepts(grammar, f'"{bad}"')
    outputs = list(samples(grammar, seed=2, count=40))
    assert outputs
    assert not [output for output in outputs if not isinstance(json.loads(output), str)]
