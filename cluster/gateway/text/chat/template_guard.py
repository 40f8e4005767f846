"""A sandboxed Jinja environment that limits the time and the size of every render of a chat template.

Problem: templates come with models, messages come from tenants, and Jinja limits neither the time nor the size of a
render. In this environment each loop iteration and each call checks the CPU time of the render. Operations that make
new texts (sums, repetitions, joins, captured blocks, replacements, field widths) add the length of the new text to the
size of the render before the text is made.
"""

from __future__ import annotations

import functools
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Final

import jinja2
import jinja2.ext
import jinja2.nodes
from jinja2.filters import make_attrgetter
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

MAX_RENDERED_CHARS: Final = 16 * 1024 * 1024
MAX_MADE_CHARS: Final = 512 * 1024 * 1024
"""Upper bound on the characters of all texts that one render makes, intermediate texts included."""
MAX_RENDER_S: Final = 2.0
"""Upper bound on the CPU time of one render, in seconds of the rendering thread."""
CLOCK_EVERY: Final = 32
"""Number of ticks (loop iterations and calls) between two readings of the clock. A reading costs more than a tick."""
MAX_NUMBER: Final = 1_000_000
"""Largest number that a template may pass to a method or filter as a width, indent or count."""
MAX_JSON_INDENT: Final = 64
_WIDE: Final = re.compile(r"\d{6,}|%[^%\w]*\*")
"""Pattern of an excessive field width, in the syntax of `%` or of `format`."""


class RenderLimitExceeded(Exception):
    """Raised when a render exceeds one of the limits of this module."""


class _Spent(threading.local):
    """The CPU time limit of the render that runs in this thread, and what the render has used so far."""

    until: float = float("inf")
    made: int = 0
    ticks: int = 0


_spent = _Spent()


@contextmanager
def bounded(cpu_s: float) -> Iterator[None]:
    """Limit one render of a chat template in this thread: its CPU time to `cpu_s` seconds, and the size of the texts
    that it makes. The limits apply within the `with` block."""
    _spent.until, _spent.made = time.thread_time() + cpu_s, 0
    try:
        yield
    finally:
        _spent.until = float("inf")


def _tick() -> None:
    _spent.ticks += 1
    if not _spent.ticks % CLOCK_EVERY and time.thread_time() > _spent.until:
        raise RenderLimitExceeded("it takes too long")


def _charge(chars: int) -> None:
    """Count a text of `chars` characters before the text is made. Raises RenderLimitExceeded."""
    if chars > MAX_RENDERED_CHARS:
        raise RenderLimitExceeded(f"a text of more than {MAX_RENDERED_CHARS} characters")
    _spent.made += chars
    if _spent.made > MAX_MADE_CHARS:
        raise RenderLimitExceeded(f"texts of more than {MAX_MADE_CHARS} characters together")


def _concat(parts: Iterable[str]) -> str:
    """Join the output of a block or macro into one text."""
    parts = list(parts)
    _charge(sum(map(len, parts)))
    return "".join(parts)


def _small(values: Iterable[object]) -> None:
    for value in values:
        if isinstance(value, int) and abs(value) > MAX_NUMBER:
            raise RenderLimitExceeded(f"the number {value}")


def _replaced(text: Any, old: Any = "", new: Any = "", *_: object, **__: object) -> None:
    grows = len(new) > len(old)  # only then is the count, which takes as long as the replacement, needed
    _charge(len(text) + (text.count(old) * len(new) if grows else 0))


def _translated(text: Any, table: Any = None, *_: object, **__: object) -> None:
    values = table.values() if isinstance(table, Mapping) else ()
    _charge(len(text) * max((len(value) for value in values if isinstance(value, str)), default=1))


def _tabs(text: Any, tabsize: int = 8) -> None:
    _charge(len(text) + len(text) * tabsize)


def _indented(text: Any, width: Any = 4, *_: object, **__: object) -> None:
    _charge(len(text) + (str(text).count("\n") + 1) * (width if isinstance(width, int) else len(width)))


def _wrapped(text: Any, *arguments: Any, **named: Any) -> None:
    _charge(len(text) * (1 + sum(len(value) for value in (*arguments, *named.values()) if isinstance(value, str))))


def _json(_: object, *arguments: Any, **named: Any) -> None:
    for value in (*arguments, *named.values()):
        if not isinstance(value, bool) and isinstance(value, int) and value > MAX_JSON_INDENT:
            raise RenderLimitExceeded(f"JSON indented by {value}")
        if isinstance(value, str) and len(value) > MAX_JSON_INDENT:
            raise RenderLimitExceeded("JSON indented by a long text")


def _joined(parts: Iterable[Any], between: object = "") -> list[Any]:
    parts = list(parts)
    _charge(sum(len(part) if isinstance(part, str | bytes) else 1 for part in parts) + len(parts) * len(str(between)))
    return parts


def _guarded(function: Callable[..., Any], name: str) -> Callable[..., Any]:
    """Return a wrapper of a Jinja filter. The wrapper refuses numbers that are too large, and counts the characters of
    a long result before the result is made."""
    first = 1 if hasattr(function, "jinja_pass_arg") else 0
    grows = _GROWING_FILTERS.get(name)

    @functools.wraps(function)
    def guarded(*args: Any, **named: Any) -> Any:
        if len(args) > first + 1 or named:
            _small((*args, *named.values()))
        if grows is not None:
            grows(*args[first:], **named)
        return function(*args, **named)

    return guarded


@jinja2.pass_eval_context
def _join_filter(context: jinja2.nodes.EvalContext, value: Any, d: str = "", attribute: Any = None) -> str:
    if attribute is not None:
        value = map(make_attrgetter(context.environment, attribute), value)
    return str(d).join(map(str, _joined(value, d)))


def _fields(text: object, *_: object, **__: object) -> None:
    if isinstance(text, str) and _WIDE.search(text):
        raise RenderLimitExceeded("a field of more than 99999 characters")


_GROWING_METHODS: Final[Mapping[str, Callable[..., None]]] = {
    "replace": _replaced,
    "translate": _translated,
    "expandtabs": _tabs,
}
_GROWING_FILTERS: Final[Mapping[str, Callable[..., None]]] = {
    "replace": _replaced,
    "format": _fields,
    "indent": _indented,
    "wordwrap": _wrapped,
    "tojson": _json,
}
"""Methods and filters that may make long texts, each with the check that runs before the method or filter."""


@jinja2.pass_context
def _round(_context: object, _: object) -> None:
    """Jinja filter that counts one loop iteration. It takes the context only to keep Jinja from evaluating the filter
    at compile time."""
    _tick()


class _Instrument(NodeTransformer):
    """Adds limits to a parsed chat template. It inserts the filter `_round` into each loop body, to count the
    iterations. It replaces each `~` (joining of texts) by a filter that counts the characters of the result. Filters
    are used because they cost less than calls."""

    def visit_For(self, node: jinja2.nodes.For) -> jinja2.nodes.Node:
        self.generic_visit(node)
        node.body.insert(0, jinja2.nodes.ExprStmt(_filtered(jinja2.nodes.Const(None), _ROUND)))
        return node

    def visit_Concat(self, node: jinja2.nodes.Concat) -> jinja2.nodes.Node:
        self.generic_visit(node)
        return _filtered(jinja2.nodes.Tuple(node.nodes, "load"), _CONCAT)


_ROUND, _CONCAT = "headrace_round", "headrace_concat"


def _filtered(node: jinja2.nodes.Expr, name: str) -> jinja2.nodes.Filter:
    return jinja2.nodes.Filter(node, name, [], [], None, None)


class Environment(ImmutableSandboxedEnvironment):
    """A Jinja sandbox with the limits of this module. Compile a template with `guarded`, and render it within
    `bounded`."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})
    concat = staticmethod(_concat)

    def __init__(
        self, extensions: Sequence[type[jinja2.ext.Extension]], filters: Mapping[str, Callable[..., Any]]
    ) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
        self.filters = {name: _guarded(function, name) for name, function in {**self.filters, **filters}.items()}
        self.filters |= {"join": _join_filter, _ROUND: _round, _CONCAT: lambda parts: _concat(map(str, parts))}

    def guarded(self, source: str) -> jinja2.Template:
        """Return a compiled template with the limits built in. Raises TemplateSyntaxError."""
        tree = self.parse(source)
        _Instrument().visit(tree)
        tree.set_lineno(1)  # for the inserted nodes, which have none
        tree.set_environment(self)
        template = self.from_string(tree)
        template.globals = dict(template.globals)  # each render copies them, and a ChainMap takes ten times as long
        return template

    def call(__self, __context: Any, __obj: Any, *args: Any, **named: Any) -> Any:
        _tick()
        if args or named:
            _small((*args, *named.values()))
            subject = getattr(__obj, "__self__", None)
            if isinstance(subject, str | bytes):
                if (grows := _GROWING_METHODS.get(__obj.__name__)) is not None:
                    grows(subject, *args, **named)
                elif __obj.__name__ == "join":
                    args = (_joined(args[0], subject),)
        return super().call(__context, __obj, *args, **named)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        wrapped = super().wrap_str_format(value)
        if wrapped is not None:
            _fields(value.__self__)
        return wrapped

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "**" and (abs(left) > 1 and abs(right) > 1024):
            raise RenderLimitExceeded("a power of more than 1024")
        if operator == "%":
            _fields(left)
        if operator == "+" and isinstance(left, str) and isinstance(right, str):
            _charge(len(left) + len(right))
            return left + right
        if operator == "*":
            for sequence, times in ((left, right), (right, left)):
                if hasattr(sequence, "__len__") and isinstance(times, int):
                    _charge(len(sequence) * max(times, 0))
        return super().call_binop(context, operator, left, right)
