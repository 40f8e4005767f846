"""Grammars that are meant to slow an engine down: small texts that compile for long, or whose masks take long."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator

from cluster.api.types import Grammar

_CLASSES = ("a", "[a-z]", "[a-z ]", ".", r"\w", "[^a]", "[a-zA-Z0-9 ]")


def _atom(draw: random.Random) -> str:
    return draw.choice(_CLASSES)


def _nested_loops(draw: random.Random) -> str:
    depth, loop = draw.randint(20, 120), draw.choice("*+")
    return "(" * depth + _atom(draw) + f"{loop})" * depth + loop


def _nested_options(draw: random.Random) -> str:
    depth, atom = draw.randint(30, 200), _atom(draw)
    return f"({atom}" * depth + ")?" * depth


def _options(draw: random.Random) -> str:
    return f"{_atom(draw)}?" * draw.randint(60, 250)


def _counts(draw: random.Random) -> str:
    most = draw.randint(50, 1000)
    return draw.choice(
        (
            f"({_atom(draw)}{{0,{most}}}){{0,{most}}}",
            f"({_atom(draw)}?{_atom(draw)}*){{{most}}}",
            f"(({_atom(draw)}{{1,9}}){{1,9}}){{1,{most}}}",
        )
    )


def _alternatives(draw: random.Random) -> str:
    parts = [_atom(draw) * draw.randint(1, 4) + draw.choice("*+") for _ in range(draw.randint(20, 100))]
    return f"({'|'.join(parts)}){draw.choice('*+')}"


def _loops_in_a_row(draw: random.Random) -> str:
    return f"({_atom(draw)}+{draw.choice(_CLASSES)}*)" * draw.randint(40, 128)


def _late(draw: random.Random) -> str:
    return f"(zq{draw.randint(10, 99)}|[0-9]+)" + draw.choice((_nested_loops, _options))(draw)


REGEXES = (_nested_loops, _nested_options, _options, _counts, _alternatives, _loops_in_a_row, _late)


def _ebnf_class(draw: random.Random) -> str:
    return draw.choice(('"a"', "[a-z]", "[a-z ]", "[^\\n]", "[a-zA-Z0-9 ]"))


def _ebnf_options(draw: random.Random) -> str:
    return "root ::= " + f"{_ebnf_class(draw)}? " * draw.randint(60, 400)


def _ebnf_doubling(draw: random.Random) -> str:
    depth = draw.randint(20, 60)
    rules = [f"d{at} ::= d{at + 1} d{at + 1}" for at in range(depth)]
    return "\n".join(["root ::= d0", *rules, f"d{depth} ::= {_ebnf_class(draw)}{draw.choice(('?', '*', ''))}"])


def _ebnf_left_recursion(draw: random.Random) -> str:
    rules = draw.randint(20, 80)
    lines = [f"r{at} ::= r{at} r{(at + 1) % rules} | r{(at + 7) % rules} | {_ebnf_class(draw)}" for at in range(rules)]
    return "\n".join(["root ::= r0", *lines])


def _ebnf_ambiguous(draw: random.Random) -> str:
    words = " | ".join(f"x{at}" for at in range(draw.randint(20, 100)))
    lines = [f"x{at} ::= {_ebnf_class(draw)} root | {_ebnf_class(draw)}" for at in range(words.count("|") + 1)]
    return "\n".join([f"root ::= {words} | root root", *lines])


def _ebnf_nested_loops(draw: random.Random) -> str:
    depth = draw.randint(30, 150)
    lines = [f"n{at} ::= (n{at + 1}){draw.choice('*+')}" for at in range(depth)]
    return "\n".join(["root ::= n0", *lines, f"n{depth} ::= {_ebnf_class(draw)}+"])


def _ebnf_counts(draw: random.Random) -> str:
    most = draw.randint(100, 2000)
    return f"root ::= (w{{0,{most}}} [a-z]{{0,{most}}}){{0,{most}}}\nw ::= {_ebnf_class(draw)}{{1,{most}}}"


def _ebnf_late(draw: random.Random) -> str:
    return f'root ::= "zq{draw.randint(10, 99)}" heavy | [0-9]+\nheavy ::= ' + f"{_ebnf_class(draw)}? " * 100


EBNF = (
    *(_ebnf_options, _ebnf_doubling, _ebnf_left_recursion, _ebnf_ambiguous, _ebnf_nested_loops, _ebnf_counts),
    _ebnf_late,
)


def _lark_options(draw: random.Random) -> str:
    return "start: " + f"{draw.choice(('/[a-z]/', 'WORD'))}? " * draw.randint(60, 300) + "\nWORD: /[a-z ]+/"


def _lark_ignored(draw: random.Random) -> str:
    words = " | ".join(f"W{at}" for at in range(60))
    lines = [f"W{at}: /{_atom(draw)}{{1,{draw.randint(5, 60)}}}/" for at in range(60)]
    return "\n".join([f"start: ({words})*", *lines, "%ignore /[ a-z]+/"])


def _lark_intersections(draw: random.Random) -> str:
    parts = " & ".join(f"/(.*{chr(97 + at)}.{{{draw.randint(5, 20)}}})*/" for at in range(draw.randint(3, 9)))
    return f"start: T\nT: {parts}"


def _lark_recursion(draw: random.Random) -> str:
    rules = draw.randint(10, 60)
    lines = [f"r{at}: r{at} r{(at + 1) % rules} | r{(at + 3) % rules}? /[a-z ]/" for at in range(rules)]
    return "\n".join(["start: r0", *lines])


LARK = (_lark_options, _lark_ignored, _lark_intersections, _lark_recursion)


def _schema_patterns(draw: random.Random) -> dict[str, object]:
    names = [f"p{at}" for at in range(draw.randint(1, 8))]
    properties = {name: {"type": "string", "pattern": f"^{draw.choice(REGEXES)(draw)}$"} for name in names}
    return {"type": "object", "properties": properties, "required": names}


def _schema_lengths(draw: random.Random) -> dict[str, object]:
    names = [f"p{at}" for at in range(draw.randint(40, 64))]
    lengths = {name: {"type": "string", "minLength": at, "maxLength": 100 + 37 * at} for at, name in enumerate(names)}
    return {"type": "object", "properties": lengths}


def _schema_items(draw: random.Random) -> dict[str, object]:
    schema: dict[str, object] = {"type": "string", "maxLength": draw.randint(50, 127)}
    for _ in range(draw.randint(4, 30)):
        schema = {"type": "array", "items": schema, "maxItems": draw.randint(50, 120)}
    return {"type": "object", "properties": {"a": schema}, "required": ["a"]}


def _schema_enums(draw: random.Random) -> dict[str, object]:
    values = ["a" * at + str(draw.random()) for at in range(draw.randint(200, 240))]
    return {"type": "object", "properties": {f"e{at}": {"enum": values[at:]} for at in range(2)}}


def _schema_recursion(draw: random.Random) -> dict[str, object]:
    count = draw.randint(20, 60)
    members = [{"$ref": f"#/$defs/d{at}"} for at in range(count)]
    definition = {"anyOf": [{"type": "string"}, {"type": "array", "items": {"anyOf": members}}]}
    return {"anyOf": members, "$defs": {f"d{at}": definition for at in range(count)}}


def _schema_optional(draw: random.Random) -> dict[str, object]:
    count = draw.randint(200, 1500)
    return {
        "type": "object",
        "properties": {f"p{at}": {"type": draw.choice(["string", "integer"])} for at in range(count)},
    }


SCHEMAS = (_schema_patterns, _schema_lengths, _schema_items, _schema_enums, _schema_recursion, _schema_optional)


def _tools(draw: random.Random) -> str:
    tags = [
        {
            "begin": f"<function=f{at}>",
            "content": {"type": "json_schema", "json_schema": draw.choice(SCHEMAS)(draw)},
            "end": "</function>",
        }
        for at in range(draw.randint(1, 8))
    ]
    return json.dumps(
        {"type": "structural_tag", "format": {"type": "triggered_tags", "triggers": ["<function="], "tags": tags}}
    )


FORMS: dict[str, Callable[[random.Random], str]] = {
    "regex": lambda draw: draw.choice(REGEXES)(draw),
    "ebnf": lambda draw: draw.choice(EBNF)(draw),
    "lark": lambda draw: draw.choice(LARK)(draw),
    "json_schema": lambda draw: json.dumps(draw.choice(SCHEMAS)(draw)),
    "structural_tag": _tools,
}


def hostile_grammars(seed: int, count: int) -> Iterator[tuple[str, Grammar]]:
    """Yield `count` grammars, each with the name of its form. All forms take turns."""
    draw = random.Random(seed)
    for at in range(count):
        form = tuple(FORMS)[at % len(FORMS)]
        kind = "grammar" if form in ("ebnf", "lark") else form
        yield form, Grammar(kind, FORMS[form](draw), field="tools" if form == "structural_tag" else "response_format")
