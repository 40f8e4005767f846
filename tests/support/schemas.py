"""Random JSON schemas with keywords of draft 2020-12. Some of the schemas cannot be enforced."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

PATTERNS = (
    *("^a+$", "a|b", "^[a-c]{1,3}$", ".", "[^a]{0,3}", r"\d+", r"\w*", "(ab|c)+", "^$", "[a-z]{2,4}?x", r"\S\s"),
    *("(?:a|b){2}", r"[\x00-c]", r"\W", "é", "[é-ü]", "a^b", "(?=a)a", '"', "[^b]{0,200}", r"\u00e9.", "é.", r"\t"),
)
NAME_PATTERNS = tuple(text for text in PATTERNS if r"\W" not in text and r"\S" not in text)
"""Expressions for names: jsonschema matches names with Unicode classes, which ECMAScript does not have."""
VALUES: tuple[Any, ...] = (None, True, False, 0, 1, -1, 1.0, 0.5, "", "a", "ab", "é", [], [1], {}, {"a": 1})
NAMES = ("a", "b", "ab", "é", "x y", "0", "")
_LEAVES: tuple[Any, ...] = (True, {}, *({"type": name} for name in ("integer", "string", "null", "boolean")))


class SchemaGenerator:
    """Draws schemas from a source of random numbers."""

    def __init__(self, source: random.Random) -> None:
        self._source = source
        self._kinds: dict[str, Callable[[dict[str, Any], int], None]] = {
            "string": self._string,
            "integer": self._integer,
            "number": self._number,
            "array": self._array,
            "object": self._object,
        }

    def root(self) -> dict[str, Any]:
        """Return a random schema with two definitions, to which its references may point."""
        return {**self._combined(3), "$defs": {"a": self._schema(1), "b": self._schema(2)}}

    def _chance(self, share: float) -> bool:
        return self._source.random() < share

    def _schema(self, depth: int) -> Any:
        if depth > 0 and self._chance(0.95):
            return self._combined(depth)
        finite = ({"const": self._source.choice(VALUES)}, {"enum": self._source.sample(VALUES, 2)})
        return self._source.choice((*_LEAVES, *finite))

    def _combined(self, depth: int) -> dict[str, Any]:
        if self._chance(0.06):
            return {"$ref": self._source.choice(("#", "#/$defs/a", "#/$defs/b"))}
        if self._chance(0.15):
            members = [self._schema(depth - 1) for _ in range(self._source.randint(1, 3))]
            keyword = self._source.choice(("anyOf", "oneOf", "allOf"))
            return {keyword: members} if self._chance(0.7) else {**self._typed(depth), keyword: members}
        schema = self._typed(depth)
        extra: tuple[tuple[str, Any], ...] = (
            ("enum", self._source.sample(VALUES, 2)),
            ("const", self._source.choice(VALUES)),
            ("not", {}),
        )
        schema.update((keyword, value) for keyword, value in extra if self._chance(0.04))
        return schema

    def _typed(self, depth: int) -> dict[str, Any]:
        names = self._source.sample((*self._kinds, "null", "boolean"), 2 if self._chance(0.1) else 1)
        schema: dict[str, Any] = {"type": names if len(names) > 1 else names[0]} if self._chance(0.85) else {}
        for name in (*names, *([self._source.choice(tuple(self._kinds))] if self._chance(0.1) else [])):
            if name in self._kinds:
                self._kinds[name](schema, depth - 1)
        return schema

    def _maybe(self, schema: dict[str, Any], share: float, **keywords: Callable[[], Any]) -> None:
        schema.update((keyword, draw()) for keyword, draw in keywords.items() if self._chance(share))

    def _below(self, count: int) -> Callable[[], int]:
        return lambda: self._source.randint(0, count)

    def _one_of(self, *values: Any) -> Callable[[], Any]:
        return lambda: self._source.choice(values)

    def _string(self, schema: dict[str, Any], _: int) -> None:
        self._maybe(schema, 0.25, minLength=self._below(3), maxLength=self._below(5), pattern=self._one_of(*PATTERNS))
        self._maybe(schema, 0.1, format=self._one_of("date", "uuid", "ipv4", "time", "hostname", "email", "iri"))

    def _integer(self, schema: dict[str, Any], _: int) -> None:
        self._maybe(schema, 0.3, minimum=self._one_of(-3, 0, 2, 17, -100, 2.0), maximum=self._one_of(3, 0, 99, 1234))
        self._maybe(schema, 0.2, exclusiveMinimum=self._one_of(-3, 0, 2), exclusiveMaximum=self._one_of(5, 100))
        self._maybe(schema, 0.05, multipleOf=self._one_of(2, 0.5))

    def _number(self, schema: dict[str, Any], _: int) -> None:
        self._maybe(schema, 0.3, minimum=self._one_of(-3.5, 0, 0.1, 17, -1e-3, 1e-7))
        self._maybe(schema, 0.3, maximum=self._one_of(3.25, 0, 99, 1234.5))
        self._maybe(schema, 0.2, exclusiveMinimum=self._one_of(-3, 0, 2.5), exclusiveMaximum=self._one_of(5, 1.5, 0))

    def _array(self, schema: dict[str, Any], depth: int) -> None:
        self._maybe(schema, 0.7, items=lambda: self._source.choice((False, self._schema(depth))))
        self._maybe(schema, 0.2, prefixItems=lambda: [self._schema(depth)])
        self._maybe(schema, 0.3, minItems=self._below(3), maxItems=self._below(3))
        self._maybe(schema, 0.05, uniqueItems=lambda: True, unevaluatedItems=lambda: self._schema(depth))

    def _object(self, schema: dict[str, Any], depth: int) -> None:
        names = self._source.sample(NAMES, self._source.randint(0, 3))
        self._maybe(schema, 0.7, properties=lambda: {name: self._schema(depth) for name in names})
        self._maybe(schema, 0.4, required=lambda: names[: self._source.randint(0, 3)])
        self._maybe(schema, 0.4, additionalProperties=lambda: self._source.choice((False, True, self._schema(depth))))
        self._maybe(schema, 0.15, minProperties=self._below(3), maxProperties=self._below(3))
        self._maybe(schema, 0.1, patternProperties=lambda: {self._source.choice(NAME_PATTERNS): self._schema(depth)})
        self._maybe(schema, 0.1, propertyNames=self._one_of({"pattern": "^a"}, {"enum": ["a"]}, {"maxLength": 2}, {}))
        self._maybe(schema, 0.05, unevaluatedProperties=lambda: self._schema(depth))
