"""Refusal of JSON schemas with keywords that the grammar compiler does not enforce. The error names the keyword.

If a schema has several of the keywords `$ref`, `const`, `enum`, `anyOf`, `oneOf`, `allOf` and `type`, xgrammar reads
only the first in this order. With any of them except `type`, it ignores all other keywords of the schema. It also
ignores constraints in a schema without `type`, and unknown keywords. The output may then violate the schema without an
error. So `check_schema` accepts a schema only if each of its keywords is enforced. The tests draw outputs from the
compiled grammars of accepted schemas, and validate these outputs.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from cluster.api.outcomes import Outcome
from cluster.api.ports import EngineRefused
from cluster.worker.engine.vllm.grammar.grammar_size import (
    MAX_BOUNDED_STRINGS,
    MAX_REGEX_POSITIONS,
    bounded_strings,
    regex_positions,
)
from cluster.worker.engine.vllm.grammar.schema_limits import (
    array_problem,
    combinations,
    number_problem,
    object_problem,
    string_problem,
)
from cluster.worker.engine.vllm.grammar.schema_types import (
    ALL,
    NAMED,
    DisjointBranches,
    Json,
    SchemaTypes,
    UnusableReference,
    canonical,
    int64_problem,
    winner,
)

MAX_NESTING = 64
"""Greatest nesting of objects and arrays in a schema, as in vLLM."""
MAX_VALUES = 50_000
"""Greatest number of JSON values in a schema."""

_STRINGS, _NUMBERS = frozenset({"string"}), NAMED["number"]
_ARRAYS, _OBJECTS = frozenset({"array"}), frozenset({"object"})

KEYWORDS: dict[str, frozenset[str]] = {
    **dict.fromkeys(("type", "enum", "const", "anyOf", "oneOf", "allOf", "not", "if", "then", "else"), ALL),
    **dict.fromkeys(("$ref", "$dynamicRef", "$recursiveRef"), ALL),
    **dict.fromkeys(("minLength", "maxLength", "pattern", "format"), _STRINGS),
    **dict.fromkeys(("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"), _NUMBERS),
    **dict.fromkeys(("items", "prefixItems", "unevaluatedItems", "additionalItems", "minItems", "maxItems"), _ARRAYS),
    **dict.fromkeys(("uniqueItems", "contains", "minContains", "maxContains"), _ARRAYS),
    **dict.fromkeys(("properties", "required", "additionalProperties", "patternProperties"), _OBJECTS),
    **dict.fromkeys(("propertyNames", "minProperties", "maxProperties", "unevaluatedProperties"), _OBJECTS),
    **dict.fromkeys(("dependentRequired", "dependentSchemas", "dependencies"), _OBJECTS),
}
"""Keywords that constrain values, each with the JSON types that it constrains. All other keywords are annotations."""

_CASES = "list the allowed cases with `anyOf`"
NOT_ENFORCED: dict[str, str] = {
    "not": "say what is allowed instead, for example with `enum` or `anyOf`",
    **dict.fromkeys(("if", "then", "else", "dependentRequired", "dependentSchemas", "dependencies"), _CASES),
    **dict.fromkeys(("$dynamicRef", "$recursiveRef"), "use `$ref` with a path in this schema, as in #/$defs/name"),
    "multipleOf": "name the allowed numbers with `enum`, or leave it out",
    "additionalItems": "use `prefixItems` and `items`",
    "uniqueItems": "leave it out and remove duplicates afterwards",
    **dict.fromkeys(("contains", "minContains", "maxContains"), "describe the items with `prefixItems` and `items`"),
}
"""Keywords that are never enforced, each with the remedy."""

_TYPE_OF = {_STRINGS: "string", _NUMBERS: "number", _ARRAYS: "array", _OBJECTS: "object"}
_MAPS = ("properties", "patternProperties")
_LISTS = ("anyOf", "oneOf", "allOf", "prefixItems")
_PARTS = ("items", "unevaluatedItems", "additionalProperties", "unevaluatedProperties")


def check_schema(field: str, schema: Mapping[str, object]) -> None:
    """Raise EngineRefused for a JSON schema with a keyword that the grammar compiler does not enforce.

    `field`: the request's field that has the schema. The message names the keyword, its JSON pointer and a remedy.
    Keywords that only annotate are allowed, and so are unknown keywords. To bound the time of the check, a schema is
    also refused if it has more than MAX_VALUES values or is nested more than MAX_NESTING deep.
    """
    if problem := _size_problem(schema) or _strings_problem(schema) or _problem(schema):
        raise EngineRefused(Outcome.INVALID_FIELD.name, f"{field}: {problem}", field)


def _size_problem(schema: object) -> str:
    level, values = [schema], 0
    for _ in range(MAX_NESTING):
        inner = [value for container in level for value in _inner(container)]
        values += len(inner)
        if values > MAX_VALUES:
            return f"has more than {MAX_VALUES} values; shorten it"
        level = [value for value in inner if isinstance(value, Mapping | list)]
        if not level:
            return ""
    return f"objects and arrays are nested more than {MAX_NESTING} deep; use `$defs` and `$ref`"


def _strings_problem(schema: Mapping[str, object]) -> str:
    bounded = bounded_strings(schema)
    if len(bounded) > MAX_BOUNDED_STRINGS:
        return (
            f"has {len(bounded)} strings with a pattern or length bound; at most {MAX_BOUNDED_STRINGS} compile in time"
        )
    most = max(map(regex_positions, bounded), default=0)
    if most > MAX_REGEX_POSITIONS:
        return f"has an expression that unrolls to {most} positions, at most {MAX_REGEX_POSITIONS}: repeat fewer times"
    return ""


def _inner(container: object) -> Iterable[object]:
    if isinstance(container, Mapping):
        return container.values()
    return container if isinstance(container, list) else ()


def _problem(schema: Mapping[str, object]) -> str:
    walk = _Walk(schema)
    try:
        return next(walk.problems(), "")
    except UnusableReference as error:
        return str(error)


def _pointer(path: str, *parts: object) -> str:
    return path + "".join("/" + str(part).replace("~", "~0").replace("/", "~1") for part in parts)


@dataclass(frozen=True, slots=True)
class _Place:
    """A schema and its JSON pointer."""

    path: str
    schema: object


class _Walk:
    """A walk over the schemas that the compiler reads: the root, its subschemas, and the schemas that `$ref` refers
    to."""

    def __init__(self, root: Mapping[str, object]) -> None:
        self._types = SchemaTypes(root)
        self._disjoint = DisjointBranches(root)
        self._waiting = [_Place("", root)]
        self._seen: set[int] = set()

    def problems(self) -> Iterator[str]:
        """Yield the problems of all schemas. Each text names the keyword, its JSON pointer and the remedy."""
        while self._waiting:
            place = self._waiting.pop()
            if isinstance(place.schema, Mapping):
                if id(place.schema) not in self._seen:
                    self._seen.add(id(place.schema))
                    yield from self._schema(place.path, place.schema)
            elif place.schema is False:
                yield f"`false` at {place.path} allows no value; leave it out"
            elif place.schema is not True:
                yield f"{place.path} must be a schema: a JSON object, true or false"

    def _schema(self, path: str, schema: Json) -> Iterator[str]:
        types, chosen = self._types.of(schema), winner(schema)
        for keyword in schema:
            applies = KEYWORDS.get(keyword, frozenset())
            if applies.isdisjoint(types):
                continue  # an annotation, or a constraint of values that cannot occur here
            where = f"`{keyword}` at {_pointer(path, keyword)}"
            if keyword in NOT_ENFORCED:
                yield f"{where} is not enforced by the grammar compiler; {NOT_ENFORCED[keyword]}"
            elif keyword != chosen and (problem := self._beside(schema, keyword, chosen)):
                yield f"{where} {problem}"
            elif keyword == chosen or not chosen:
                yield from (f"{where} {problem}" for problem in self._keyword(schema, keyword, types))
        if not chosen:
            yield from (f"{_pointer(path) or 'the schema'} {problem}" for problem in combinations(schema, types))
        self._waiting += reversed(list(self._children(path, schema, chosen, types)))

    def _beside(self, schema: Json, keyword: str, chosen: str) -> str:
        """Return why the compiler ignores a keyword of a schema, with the remedy; empty if it does not ignore the
        keyword.

        `chosen`: the keyword of WINNERS that the compiler reads in this schema; "" if the schema has none of them.
        """
        if keyword == "type":
            return self._type_problem(schema, chosen)
        if not chosen:
            untyped = "type" not in schema and self._types.of(schema) == ALL
            return f'is ignored in a schema without `type`; add "type": "{_TYPE_OF[KEYWORDS[keyword]]}"' * untyped
        if chosen == "const" and keyword == "enum" and isinstance(schema["enum"], list):
            allowed = {canonical(value) for value in schema["enum"]}
            return "" if canonical(schema["const"]) in allowed else "does not have the value of `const`; correct one"
        if chosen in ("const", "enum"):
            return f"is ignored beside `{chosen}`; leave it out, and keep only values that satisfy it"
        if chosen == "$ref":
            return "is ignored beside `$ref`; move it into the schema that is referred to"
        return f"is ignored beside `{chosen}`; write it into each schema of `{chosen}`"

    def _type_problem(self, schema: Json, chosen: str) -> str:
        named = [NAMED.get(name) if isinstance(name, str) else None for name in _names(schema)]
        known = [types for types in named if types is not None]
        if not named or len(known) < len(named):
            return f"must be one or more of {', '.join(NAMED)}"
        if not chosen or self._types.of(schema) <= frozenset[str]().union(*known):
            return ""
        return f"is ignored beside `{chosen}`, which allows other types; keep only what has the type"

    def _keyword(self, schema: Json, keyword: str, types: frozenset[str]) -> Iterator[str]:
        """Yield the problems of the value of `keyword`, which is a keyword that the grammar compiler reads. `types`:
        the JSON types that the schema allows."""
        value = schema[keyword]
        if keyword in ("anyOf", "oneOf", "allOf", "enum") and not (isinstance(value, list) and value):
            yield "must be a list that is not empty"
        elif keyword == "allOf" and len(value) > 1:  # type: ignore[arg-type]
            yield "has several members, of which none is enforced; merge them into one schema"
        elif keyword == "oneOf" and not self._disjoint.are_disjoint(value):  # type: ignore[arg-type]
            yield (
                "has members that may overlap, and is then read as `anyOf`; use `anyOf`, or give each member an own "
                "type or a required property with an own `const`"
            )
        elif problem := _value_problem(schema, keyword, types):
            yield problem

    def _children(self, path: str, schema: Json, chosen: str, types: frozenset[str]) -> Iterator[_Place]:
        """Yield those subschemas of a schema that the compiler reads."""
        if chosen == "$ref":
            yield _Place(str(schema["$ref"]), self._types.resolve(schema["$ref"]))
        keywords = (chosen,) if chosen else tuple(schema)
        for keyword in keywords:
            value = schema[keyword]
            if KEYWORDS.get(keyword, frozenset()).isdisjoint(types):
                continue
            if keyword in _LISTS and isinstance(value, list):
                yield from (_Place(_pointer(path, keyword, i), inner) for i, inner in enumerate(value))
            elif keyword in _MAPS and isinstance(value, Mapping):
                yield from (_Place(_pointer(path, keyword, name), inner) for name, inner in value.items())
            elif keyword in _PARTS and isinstance(value, Mapping):
                yield _Place(_pointer(path, keyword), value)


def _value_problem(schema: Json, keyword: str, types: frozenset[str]) -> str:
    applies = KEYWORDS[keyword]
    if keyword in ("const", "enum"):
        return int64_problem(schema[keyword])
    if applies is _STRINGS:
        return string_problem(keyword, schema[keyword])
    if applies is _NUMBERS:
        return number_problem(schema[keyword], is_whole="fraction" not in types or "integer" in _names(schema))
    if applies is _ARRAYS:
        return array_problem(keyword, schema[keyword])
    if applies is _OBJECTS:
        return object_problem(keyword, schema[keyword])
    return ""


def _names(schema: Json) -> list[object]:
    names = schema.get("type")
    return names if isinstance(names, list) else [names]
