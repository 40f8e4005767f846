"""The JSON types that a schema allows, and the targets of references between schemas.

Schemas are read in the same way as the grammar compiler reads them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence

Json = Mapping[str, object]

NAMED: dict[str, frozenset[str]] = {
    **{name: frozenset({name}) for name in ("null", "boolean", "integer", "string", "array", "object")},
    "number": frozenset({"integer", "fraction"}),
}
"""Type names of JSON schemas, each as a set of disjoint types: a number is an integer or a fraction."""
ALL = frozenset[str]().union(*NAMED.values())

WINNERS = ("$ref", "const", "enum", "anyOf", "oneOf", "allOf")
"""Keywords in the order of their precedence. The compiler reads only the first that a schema has."""
MAX_HOPS = 64
"""Greatest number of `$ref`, `anyOf`, `oneOf` and `allOf` between a schema and its type."""
_OBJECT_MARKS = ("properties", "additionalProperties", "unevaluatedProperties")
_ARRAY_MARKS = ("items", "prefixItems", "unevaluatedItems")


class UnusableReference(Exception):
    """An error for a `$ref` that the compiler misreads. The message has the reason and the remedy."""


def winner(schema: Json) -> str:
    """Return the first keyword of WINNERS in a schema, which is the one that the compiler reads.

    Returns "" if the schema has none of these keywords. The compiler then reads `type` and the keywords of that type.
    """
    return next((keyword for keyword in WINNERS if keyword in schema), "")


def canonical(value: object) -> str:
    """Return a text that is the same for equal JSON values. 1 and 1.0 count as equal, 1 and true as different."""
    return json.dumps(_plain(value), sort_keys=True)


def _plain(value: object) -> object:
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, list):
        return [_plain(inner) for inner in value]
    return {key: _plain(inner) for key, inner in value.items()} if isinstance(value, Mapping) else value


def int64_problem(value: object) -> str:
    """Return what is wrong with a value of `const` or `enum`; empty if nothing is wrong.

    A value with an integer of more than 64 bits is wrong, since the compiler rounds such integers.
    """
    if isinstance(value, list):
        return next(filter(None, map(int64_problem, value)), "")
    if isinstance(value, Mapping):
        return next(filter(None, map(int64_problem, value.values())), "")
    if isinstance(value, int) and not -(1 << 63) <= value < 1 << 63:
        return "has an integer of more than 64 bits, which is rounded; write it as a string"
    return ""


class SchemaTypes:
    """The types that the schemas below one root allow. Each schema is examined once.

    `by_standard`: whether a schema without `type` allows all types, as in the JSON Schema standard. If
    `by_standard` is false, the rule of the compiled grammar applies: a schema without `type` allows only
    objects if it has `properties`, and only arrays if it has `items`.
    """

    def __init__(self, root: Json, by_standard: bool = False) -> None:
        self._root = root
        self._by_standard = by_standard
        self._known: dict[int, frozenset[str]] = {}
        self._open: set[int] = set()

    def of(self, schema: object) -> frozenset[str]:
        """Return the types of the values that the schema allows. If they are not certain, the result includes more
        types.

        Raises UnusableReference for a reference that cannot be followed, and for a schema that is part of itself.
        """
        if not isinstance(schema, Mapping):
            return frozenset() if schema is False else ALL
        key = id(schema)
        if key in self._known:
            return self._known[key]
        if key in self._open:
            raise UnusableReference("`$ref` makes a schema a part of itself; refer to it only below an object or array")
        if len(self._open) >= MAX_HOPS:
            raise UnusableReference(f"more than {MAX_HOPS} `$ref` and `anyOf` follow each other; refer directly")
        self._open.add(key)
        self._known[key] = self._find(schema)
        self._open.remove(key)
        return self._known[key]

    def _find(self, schema: Json) -> frozenset[str]:
        chosen = winner(schema)
        value = schema.get(chosen)
        if chosen == "$ref":
            return self.of(self.resolve(value))
        if chosen == "const":
            return type_of(value)
        if chosen and isinstance(value, list):
            if chosen == "allOf" and len(value) > 1:
                return ALL
            inner = map(type_of, value) if chosen == "enum" else map(self.of, value)
            return frozenset[str]().union(*inner) or ALL  # an empty list is refused elsewhere
        if chosen or (self._by_standard and "type" not in schema):
            return ALL
        return _declared(schema)

    def resolve(self, reference: object) -> object:
        """Return the schema that a `$ref` refers to.

        Raises UnusableReference if the reference is not a plain path in the root schema.
        """
        if not isinstance(reference, str) or not (reference == "#" or reference.startswith("#/")):
            raise UnusableReference(
                f"`$ref` {str(reference)[:100]!r} is not followed; copy the schema to `$defs` and use #/$defs/name"
            )
        place: object = self._root
        parts = reference.split("/")[1:]
        if any(not part or "~" in part or "%" in part for part in parts):
            raise UnusableReference(
                f"`$ref` {reference[:100]!r} has an empty part or an escape; rename what it refers to"
            )
        for part in parts:
            if not isinstance(place, Mapping) or part not in place:
                raise UnusableReference(f"`$ref` {reference[:100]!r} refers to nothing in this schema; correct it")
            place = place[part]
        return place

    def target(self, schema: object) -> object:
        """Follow a chain of `$ref`; return the schema at its end."""
        for _ in range(MAX_HOPS):
            if not isinstance(schema, Mapping) or winner(schema) != "$ref":
                break
            schema = self.resolve(schema["$ref"])
        return schema


def type_of(value: object) -> frozenset[str]:
    """Return the type of a JSON value."""
    if isinstance(value, bool):
        return NAMED["boolean"]
    if isinstance(value, float):
        return frozenset({"integer"}) if value.is_integer() else frozenset({"fraction"})
    names = ((str, "string"), (int, "integer"), (list, "array"), (Mapping, "object"))
    return next((NAMED[name] for kind, name in names if isinstance(value, kind)), NAMED["null"])


def _declared(schema: Json) -> frozenset[str]:
    if "type" in schema:
        names = schema["type"] if isinstance(schema["type"], list) else [schema["type"]]
        known = [NAMED.get(name, ALL) if isinstance(name, str) else ALL for name in names]
        return frozenset[str]().union(*known) if known else ALL
    if any(mark in schema for mark in _OBJECT_MARKS):
        return NAMED["object"]
    return NAMED["array"] if any(mark in schema for mark in _ARRAY_MARKS) else ALL


class DisjointBranches:
    """Proof that no value satisfies two members of a `oneOf`.

    The proof takes time linear in the size of the members.
    """

    def __init__(self, root: Json) -> None:
        self._types = SchemaTypes(root, by_standard=True)

    def are_disjoint(self, branches: Sequence[object]) -> bool:
        """Return whether the members of a `oneOf` are proven to be disjoint.

        Members are disjoint if they differ in their types, in their allowed values, or in the value of one required
        property.
        """
        if len(branches) == 1 or self._differ(branches):
            return True
        targets = [self._types.target(branch) for branch in branches]
        names = self._fixed(targets[0])
        return any(self._tells_apart(name, targets) for name in names)

    def _differ(self, branches: Sequence[object]) -> bool:
        typed: set[str] = set()
        types_of_values: set[str] = set()
        values: set[str] = set()
        for branch in branches:
            types, finite = self._types.of(branch), self._values(self._types.target(branch))
            if not types.isdisjoint(typed):
                return False
            if finite is None:
                if not types.isdisjoint(types_of_values):
                    return False
                typed |= types
                continue
            texts = {canonical(value) for value in finite}
            if not texts.isdisjoint(values):
                return False
            values |= texts
            types_of_values |= types
        return True

    def _tells_apart(self, name: str, targets: Sequence[object]) -> bool:
        seen: set[str] = set()
        for target in targets:
            texts = {canonical(value) for value in self._fixed(target).get(name, ())}
            if not texts or not texts.isdisjoint(seen):
                return False
            seen |= texts
        return True

    def _fixed(self, target: object) -> dict[str, Sequence[object]]:
        """Return the allowed values of each required property whose schema is a `const` or an `enum`, by property.

        The result is empty if `target` is not a plain schema of an object.
        """
        if not isinstance(target, Mapping) or winner(target) or self._types.of(target) != NAMED["object"]:
            return {}
        properties, required = target.get("properties"), target.get("required")
        if not isinstance(properties, Mapping) or not isinstance(required, list):
            return {}
        return dict(self._with_values(properties, required))

    def _with_values(self, properties: Json, required: Sequence[object]) -> Iterator[tuple[str, Sequence[object]]]:
        for name in required:
            if isinstance(name, str) and name in properties:
                values = self._values(self._types.target(properties[name]))
                if values:
                    yield name, values

    def _values(self, schema: object) -> Sequence[object] | None:
        """Return the values of a schema that is a `const` or an `enum`; None for other schemas."""
        chosen = winner(schema) if isinstance(schema, Mapping) else ""
        if chosen == "const":
            return [schema["const"]]  # type: ignore[index]
        values = schema["enum"] if chosen == "enum" else None  # type: ignore[index]
        return values if isinstance(values, list) else None
