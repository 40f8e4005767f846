"""Repair of xgrammar's grammars for JSON strings (xgrammar 0.2.8), so that all outputs are valid JSON.

Problem: xgrammar allows control characters in a string with a length bound, and unknown escapes in the local part of an
e-mail address. JSON allows neither. The repaired compiler changes the grammar's text: in a string with a length bound,
it replaces the character class, and for e-mail addresses it uses a regular expression without quoted parts. Other
grammars are compiled unchanged.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import Any

_LOOSE = r"[^\"\\\r\n]"
_STRICT = r"[^\0-\x1f\"\\]"
_LITERAL_OR_CLASS = re.compile(r'"(?:\\.|[^"\\])*"|\[(?:\\.|[^\]\\])*\]')

_ATOM = r"[A-Za-z0-9!#$%&'*+/=?^_`{|}~-]+"
_LABEL = r"[A-Za-z0-9]([A-Za-z0-9-]*[A-Za-z0-9])?"
EMAIL = rf"^{_ATOM}(\.{_ATOM})*@{_LABEL}(\.{_LABEL})*$"
"""Regular expression for e-mail addresses as in RFC 5321, but without quoted local parts and address literals."""

_DATA = frozenset({"const", "enum", "default", "examples"})


def without_control_characters(grammar: str) -> str:
    """Return the text of a grammar, changed so that strings with a length bound cannot have control characters."""
    return _LITERAL_OR_CLASS.sub(lambda token: _STRICT if token[0] == _LOOSE else token[0], grammar)


def with_plain_addresses(specification: str) -> str:
    """Replace each format `email` by a regular expression.

    `specification`: a JSON schema, or JSON that contains schemas.
    """
    if '"email"' not in specification:
        return specification
    return json.dumps(_plain_addresses(json.loads(specification)))


def _plain_addresses(value: Any) -> Any:
    if isinstance(value, list):
        return [_plain_addresses(inner) for inner in value]
    if not isinstance(value, Mapping):
        return value
    rewritten = {key: inner if key in _DATA else _plain_addresses(inner) for key, inner in value.items()}
    if rewritten.get("format") == "email":
        del rewritten["format"]
        rewritten["pattern"] = EMAIL
    return rewritten


class StrictCompiler:
    """A wrapper of xgrammar's compiler. The grammars that it makes from JSON schemas and structural tags allow only
    valid JSON."""

    def __init__(self, compiler: Any) -> None:
        self._compiler = compiler

    def __getattr__(self, name: str) -> Any:
        return getattr(self._compiler, name)

    def compile_json_schema(self, schema: str, **options: Any) -> Any:
        """Compile a JSON schema. Raises RuntimeError for an invalid schema."""
        import xgrammar

        schema = with_plain_addresses(schema)
        repaired = self._repaired(lambda: xgrammar.Grammar.from_json_schema(schema, **options))
        return repaired or self._compiler.compile_json_schema(schema, **options)

    def compile_structural_tag(self, tag: Any, *triggers: Any) -> Any:
        """Compile a structural tag, which is given as JSON, or in xgrammar's older form as a list of tags with
        `triggers`."""
        import xgrammar

        tag = with_plain_addresses(tag) if isinstance(tag, str) else tag
        repaired = self._repaired(lambda: xgrammar.Grammar.from_structural_tag(tag, *triggers))
        return repaired or self._compiler.compile_structural_tag(tag, *triggers)

    def _repaired(self, make: Callable[[], Any]) -> Any:
        """Return the compiled grammar if it needed a repair; None if it needs no repair.

        `make` returns xgrammar's grammar.
        """
        import xgrammar

        text = str(make())
        strict = without_control_characters(text)
        return None if strict == text else self._compiler.compile_grammar(xgrammar.Grammar.from_ebnf(strict))


def install() -> None:
    """Make vLLM's xgrammar backend use the repaired compiler."""
    from vllm.v1.structured_output.backend_xgrammar import XgrammarBackend

    prepare = XgrammarBackend.__post_init__

    def __post_init__(self: Any) -> None:
        prepare(self)
        self.compiler = StrictCompiler(self.compiler)

    XgrammarBackend.__post_init__ = __post_init__
