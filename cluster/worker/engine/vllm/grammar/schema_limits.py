"""Checks of the values of keywords in JSON schemas, grouped by the JSON type that a keyword constrains.

The grammar compiler enforces a keyword only with certain values.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

from cluster.worker.engine.vllm.grammar.schema_patterns import pattern_problem
from cluster.worker.engine.vllm.grammar.schema_types import NAMED, Json

FORMATS = frozenset(
    (
        *("date", "time", "date-time", "duration", "email", "hostname", "ipv4", "ipv6"),
        *("uri", "uri-reference", "uri-template", "uuid"),
    )
)
"""Formats of strings that the grammar compiler enforces."""
MAX_COUNT = (1 << 31) - 1
MAX_COUNTED_PROPERTIES = 64
"""Greatest number of properties in a schema with `minProperties` or `maxProperties`. The grammar's size grows with the
square of this number."""
_MAX_BOUND = 1 << 53

_NAMES_MAY_HAVE = frozenset({"type", "pattern", "minLength", "maxLength", "format", "enum", "const"})


def string_problem(keyword: str, value: object) -> str:
    """Return the reason why the grammar compiler does not enforce this value of a JSON Schema keyword for strings, such
    as `maxLength`; "" if the compiler enforces the value."""
    if keyword in ("minLength", "maxLength"):
        return _count_problem(value)
    if not isinstance(value, str):
        return "must be a string"
    if keyword == "format":
        known = ", ".join(sorted(FORMATS))
        return "" if value in FORMATS else f"is {value[:40]!r}, which is not enforced; use `pattern`, or one of {known}"
    problem = pattern_problem(value)
    return problem and f"{value[:60]!r} {problem}"


def number_problem(value: object, is_whole: bool) -> str:
    """Return why the grammar compiler cannot enforce a number as a bound; empty if it can.

    `value`: the value of a JSON Schema keyword such as `maximum`. `is_whole`: whether the keyword bounds integers.
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        return "must be a number"
    if isinstance(value, float) and not math.isfinite(value):
        return "must be a number"
    if is_whole and value != int(value):
        return "must be a whole number where it bounds integers"
    if abs(value) > _MAX_BOUND:
        return f"must be between -{_MAX_BOUND} and {_MAX_BOUND}"
    return ""


def array_problem(keyword: str, value: object) -> str:
    """Return why the grammar compiler cannot enforce a keyword of a JSON Schema for arrays; empty if it can. `value`:
    the value of the keyword."""
    if keyword in ("minItems", "maxItems"):
        return _count_problem(value)
    if keyword == "prefixItems":
        good = isinstance(value, list) and value and all(isinstance(item, Mapping) for item in value)
        return "" if good else "must be a list of JSON objects that is not empty"
    if isinstance(value, list):
        return "must be one schema; use `prefixItems` for a list of schemas"
    return "" if isinstance(value, bool | Mapping) else "must be a schema"


def object_problem(keyword: str, value: object) -> str:
    """Return why the grammar compiler cannot enforce a JSON Schema keyword for objects, such as `required`, with this
    value. Returns "" if the compiler can enforce it."""
    if keyword in ("minProperties", "maxProperties"):
        return _count_problem(value)
    if keyword == "required":
        good = isinstance(value, list) and all(isinstance(name, str) for name in value)
        return "" if good else "must be a list of strings"
    if keyword == "propertyNames":
        return _names_problem(value)
    if keyword in ("properties", "patternProperties"):
        if not isinstance(value, Mapping):
            return "must be a JSON object"
        return _keys_problem(value) if keyword == "patternProperties" else ""
    return "" if isinstance(value, bool | Mapping) else "must be a schema"


def _count_problem(value: object) -> str:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= MAX_COUNT:
        return f"must be a whole number between 0 and {MAX_COUNT}"
    return ""


def _keys_problem(patterns: Json) -> str:
    if len(patterns) > 1:
        return "has several expressions, which may match one name; use one expression"
    return next((f"{key[:60]!r} {problem}" for key in patterns if (problem := pattern_problem(key))), "")


def _names_problem(names: object) -> str:
    if not isinstance(names, Mapping):
        return "must be a JSON object"
    for keyword, value in names.items():
        if keyword not in _NAMES_MAY_HAVE:
            return f"has `{keyword}`, which is not enforced in it; use one of {', '.join(sorted(_NAMES_MAY_HAVE))}"
        if keyword == "type" and value != "string":
            return 'has a `type` other than "string"; names are strings'
        if keyword in ("pattern", "format", "minLength", "maxLength") and (problem := string_problem(keyword, value)):
            return f"has `{keyword}`, which {problem}"
    listed = names.get("enum", [names["const"]] if "const" in names else None)
    if listed is not None:
        good = isinstance(listed, list) and listed and all(isinstance(name, str) for name in listed)
        alone = set(names) <= {"type", "enum"} or set(names) <= {"type", "const"}
        return "" if good and alone else "must have strings alone in `enum` or `const`"
    return string_combinations(names) or ("" if names else "is empty; leave it out")


def string_combinations(schema: Json) -> str:
    """Return which string keywords of a schema cannot be combined, with the remedy; empty if there is no such
    combination."""
    bounded = "minLength" in schema or "maxLength" in schema
    if "pattern" in schema and "format" in schema:
        return "has `pattern` and `format`, of which only `format` is enforced; use one of them"
    if bounded and ("pattern" in schema or "format" in schema):
        other = "pattern" if "pattern" in schema else "format"
        remedy = "bound the length in the expression, as in ^[a-z]{1,20}$" if other == "pattern" else "leave them out"
        return f"has `{other}` beside `minLength` or `maxLength`, which are then ignored; {remedy}"
    return ""


def object_combinations(schema: Json) -> Iterator[str]:
    """Yield an error text for each combination of object keywords in the schema that cannot be enforced. Each text ends
    with the remedy."""
    properties = schema.get("properties")
    properties = properties if isinstance(properties, Mapping) else {}
    required = schema.get("required")
    for name in required if isinstance(required, list) else ():
        if name not in properties:
            yield f"has {str(name)[:60]!r} in `required`, which is enforced only of `properties`; add the property"
    others = [key for key in ("patternProperties", "propertyNames") if key in schema]
    if len(others) == 2 or (others and "properties" in schema):
        yield f"has `{others[0]}` beside `{'properties' if 'properties' in schema else others[1]}`; use one of them"
    rest = schema.get("additionalProperties", schema.get("unevaluatedProperties", False))
    if "propertyNames" in schema and (
        schema.get("additionalProperties") is False or schema.get("unevaluatedProperties", True) is not True
    ):
        yield "has `propertyNames` beside `additionalProperties` or `unevaluatedProperties`; leave the other out"
    is_open = rest is not False or bool(others)
    yield from _counted(schema, properties, is_open)
    if rest is not False:
        for name in properties:
            if not name.isascii() or not name.isprintable() or set(name) & set('"\\'):
                yield (
                    f"has the property {name[:60]!r} beside `additionalProperties`, which may repeat it with another "
                    'value; use printable ASCII without quotes in names, or set "additionalProperties": false'
                )


def _counted(schema: Json, properties: Json, is_open: bool) -> Iterator[str]:
    low = schema.get("minProperties", 0)
    if is_open and isinstance(low, int) and low > 1:
        yield "has `minProperties` above 1, but a name may be repeated and is counted twice; name the properties"
    if len(properties) > MAX_COUNTED_PROPERTIES and ("minProperties" in schema or "maxProperties" in schema):
        yield f"counts more than {MAX_COUNTED_PROPERTIES} properties; leave out `minProperties` and `maxProperties`"


def combinations(schema: Json, types: frozenset[str]) -> Iterator[str]:
    """Yield a message for each group of keywords of a schema that cannot be combined. The message has the
    remedy.

    `types`: the types that the schema allows.
    """
    if NAMED["string"] <= types and (problem := string_combinations(schema)):
        yield problem
    if NAMED["object"] <= types:
        yield from object_combinations(schema)
