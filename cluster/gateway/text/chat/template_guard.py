"""A sandboxed Jinja environment that limits the time and the size of every render of a chat template.

Problem: templates come with models, messages come from tenants, and Jinja limits neither the time nor the size of a
render. In this environment each loop iteration, call and filter checks the CPU time of the render. Every operator,
filter and method that makes a text or a container adds the size of what it makes to the size of the render, before it
is made if it can be larger than its inputs. A container is measured with everything in it before it is written as a
text, compared or used as a key: `[x, x]` in a loop doubles its text each time, and makes almost nothing itself.
"""

from __future__ import annotations

import functools
import re
import threading
import time
from collections.abc import (
    Callable,
    ItemsView,
    Iterable,
    Iterator,
    KeysView,
    Mapping,
    Sequence,
    Sized,
    ValuesView,
)
from contextlib import contextmanager
from typing import Any, Final

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.runtime
from jinja2.filters import make_attrgetter
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
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
MAX_BITS: Final = 1 << 16
"""Largest size of a whole number in bits. Larger ones take quadratic time."""
MAX_SLOW: Final = 1 << 17
"""Largest number of items or characters for a filter of _SLOW_FILTERS, which takes a second for a million of them."""
ITEM_CHARS: Final = 16
"""Size of an item of a container, in characters of a text."""
GLOBALS: Final = ("namespace", "dict", "range", "cycler", "joiner")
"""Jinja's global functions that chat templates may use. `lipsum` makes endless text in one call."""
_WIDE: Final = re.compile(r"\d{6,}|%[^%\w]*\*")
"""Pattern of an excessive field width, in the syntax of `%` or of `format`."""


_ROUND, _CONCAT = "headrace_round", "headrace_concat"
_WEIGHED, _MADE = "headrace_weighed", "headrace_made"
_NEVER: Final = float("inf")
_TEXTS: Final = (str, bytes)


class RenderLimitExceeded(Exception):
    """Raised when a render exceeds one of the limits of this module."""


class _Spent(threading.local):
    """The CPU time limit of the render that runs in this thread, and what the render has used so far."""

    until: float = _NEVER
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
        _spent.until = _NEVER


def _tick() -> None:
    _spent.ticks += 1
    if not _spent.ticks % CLOCK_EVERY and time.thread_time() > _spent.until:
        raise RenderLimitExceeded("it takes too long")


def _charge(chars: int) -> None:
    """Count a text of `chars` characters before the text is made. Raises RenderLimitExceeded."""
    if chars > MAX_RENDERED_CHARS:
        raise RenderLimitExceeded(f"a text or list of more than {MAX_RENDERED_CHARS} characters")
    _count(chars)


def _count(chars: int) -> None:
    """Count texts of `chars` characters together. Raises RenderLimitExceeded."""
    _spent.made += chars
    if _spent.made > MAX_MADE_CHARS:
        raise RenderLimitExceeded(f"texts and lists of more than {MAX_MADE_CHARS} characters together")
    if chars > CLOCK_EVERY * 1024 and time.thread_time() > _spent.until:
        raise RenderLimitExceeded("it takes too long")


def _size(value: Any) -> int:
    """Return the size of a text or container itself, without what its items contain."""
    if isinstance(value, _TEXTS):
        return len(value)
    return ITEM_CHARS * len(value) if isinstance(value, _CONTAINERS) else 0


_PLAIN: Final = frozenset((str, int, float, bool, type(None)))
_CONTAINERS: Final = (list, tuple, dict, set, range, KeysView, ValuesView, ItemsView)
_NESTING: Final = (list, tuple, dict, set, KeysView, ValuesView, ItemsView, Namespace)


def weighed(value: Any) -> Any:
    """Return a value that is about to be written as a text, compared or hashed. If it is a container, first count
    everything in it, as often as it occurs. Raises RenderLimitExceeded."""
    if type(value) in _PLAIN or not isinstance(value, _NESTING):
        return value
    todo, size, seen = [value], 0, 0
    while todo:
        item = todo.pop()
        if isinstance(item, _TEXTS):
            size += len(item)
        elif isinstance(item, _NESTING):
            if isinstance(item, Namespace):
                item = item._Namespace__attrs
            size += ITEM_CHARS * (1 + len(item))
            if size > MAX_RENDERED_CHARS:
                break  # before the items are put on the stack
            seen += 1
            if not seen % CLOCK_EVERY:
                _tick()
            todo += item
            if isinstance(item, dict):
                todo += item.values()
    _charge(size)
    return value


def _ticking(items: Iterable[Any]) -> Iterator[Any]:
    for item in items:
        _tick()
        yield item


def _concat(parts: Iterable[str]) -> str:
    """Join the output of a block or macro into one text."""
    parts = list(parts)
    _charge(sum(map(len, parts)))
    return "".join(parts)


def _small(values: Iterable[object]) -> None:
    for value in values:
        if isinstance(value, int):
            if abs(value) > MAX_NUMBER:
                raise RenderLimitExceeded("a number above 1000000 as an argument")
            _count(4 * ITEM_CHARS * abs(value))


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
    parts = list(map(weighed, parts))
    _charge(sum(len(part) if isinstance(part, _TEXTS) else 1 for part in parts) + len(parts) * len(str(between)))
    return parts


def _guarded(function: Callable[..., Any], name: str) -> Callable[..., Any]:
    """Return a wrapper of a Jinja filter. The wrapper refuses numbers that are too large, and counts the characters of
    a long result before the result is made."""
    first = 1 if hasattr(function, "jinja_pass_arg") else 0
    grows = _GROWING_FILTERS.get(name)
    times = ITEM_CHARS if name in _ITEM_FILTERS else 6 if name in _ESCAPING_FILTERS else 1
    is_lazy, is_slow, looks_inside = name in _LAZY_FILTERS, name in _SLOW_FILTERS, name not in _SHALLOW_FILTERS

    @functools.wraps(function)
    def guarded(*args: Any, **named: Any) -> Any:
        if _spent.until == _NEVER:  # Jinja evaluates filters of constants when it compiles, and catches this
            raise RenderLimitExceeded("a filter is evaluated only in a render")
        value = args[first] if len(args) > first else None
        if type(value) not in _FREE:
            if is_slow and isinstance(value, Sized) and len(value) > MAX_SLOW:
                raise RenderLimitExceeded(f"more than {MAX_SLOW} items or characters for the filter {name}")
            if isinstance(value, _TEXTS):
                _count(len(value) * times)
            else:
                _count(_size(value))
                if looks_inside:
                    weighed(value)
        if len(args) > first + 1 or named:
            rest = (*args[first + 1 :], *named.values())
            _small(rest)
            for extra in rest:
                weighed(extra)
        if grows is not None:
            grows(*args[first:], **named)
        made = function(*args, **named)
        return _ticking(made) if is_lazy else made

    return guarded


@jinja2.pass_eval_context
def _join_filter(context: jinja2.nodes.EvalContext, value: Any, d: str = "", attribute: Any = None) -> str:
    if attribute is not None:
        value = map(make_attrgetter(context.environment, attribute), value)
    return str(d).join(map(str, _joined(value, d)))


def _fields(text: object, *values: Any, **named: Any) -> None:
    """Count the text that a format string makes of values, each of which it may name in each field."""
    if isinstance(text, str):
        if _WIDE.search(text):
            raise RenderLimitExceeded("a field of more than 99999 characters")
        largest = 1
        for value in (*values, *named.values()):
            before = _spent.made
            weighed(value)
            largest = max(largest, len(value) if isinstance(value, _TEXTS) else _spent.made - before)
        _charge(len(text) + (text.count("%") + text.count("{")) * largest)


def _split(text: Any, separator: Any = None, *_: object, **__: object) -> None:
    pieces = text.count(separator) if separator else len(text) // 2
    _count(len(text) + 2 * ITEM_CHARS * pieces)


def _lines(text: Any, *_: object, **__: object) -> None:
    _count(len(text) * (1 + ITEM_CHARS))


def _whole_number(text: Any, *_: object, **__: object) -> None:
    if isinstance(text, _TEXTS) and len(text) > MAX_BITS // 16:
        raise RenderLimitExceeded("a number of too many digits")


_FREE: Final = frozenset((int, float, bool, type(None), jinja2.Undefined))
_LAZY_FILTERS: Final = frozenset(("map", "select", "reject", "selectattr", "rejectattr", "batch", "slice"))
"""Filters that return a generator. Its items are counted as loop iterations, whatever reads them."""
_SHALLOW_FILTERS: Final = _LAZY_FILTERS | frozenset(
    ("length", "count", "first", "last", "list", "items", "default", "d", "random", "reverse", "attr", "join")
)
"""Filters that neither write, compare nor hash the items of a container."""
_ITEM_FILTERS: Final = frozenset(("list", "map", "select", "reject", "batch", "slice", "unique", "sort", "groupby"))
"""Filters that make an item of each character of a text."""
_ESCAPING_FILTERS: Final = frozenset(("escape", "e", "forceescape", "urlencode", "xmlattr", "tojson", "upper", "title"))
_TEXT_FILTERS: Final = frozenset(("trim", "tojson", "string", "join", "replace", "upper", "lower", "length", _CONCAT))
_SLOW_FILTERS: Final = frozenset(
    (
        *("sort", "groupby", "dictsort", "unique", "min", "max", "sum", "urlize", "striptags", "pprint", "wordwrap"),
        *("title", "wordcount", "xmlattr", "filesizeformat", "urlencode"),
    )
)
_GROWING_METHODS: Final[Mapping[str, Callable[..., None]]] = {
    "replace": _replaced,
    "translate": _translated,
    "expandtabs": _tabs,
    "split": _split,
    "rsplit": _split,
    "splitlines": _lines,
}
_GROWING_FILTERS: Final[Mapping[str, Callable[..., None]]] = {
    "replace": _replaced,
    "format": _fields,
    "indent": _indented,
    "wordwrap": _wrapped,
    "tojson": _json,
    "int": _whole_number,
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

    def visit_Output(self, node: jinja2.nodes.Output) -> jinja2.nodes.Node:
        self.generic_visit(node)
        node.nodes = [_weighing(part) for part in node.nodes]
        return node

    def visit_Getitem(self, node: jinja2.nodes.Getitem) -> jinja2.nodes.Node:
        self.generic_visit(node)
        if isinstance(node.arg, jinja2.nodes.Slice):
            return _filtered(node, _MADE)
        node.arg = _weighing(node.arg)  # the hash of a key takes as long as the text
        return node

    def visit_Compare(self, node: jinja2.nodes.Compare) -> jinja2.nodes.Node:
        self.generic_visit(node)
        if sum(not isinstance(part, jinja2.nodes.Literal) for part in (node.expr, *(o.expr for o in node.ops))) > 1:
            node.expr = _weighing(node.expr)
            for operand in node.ops:
                operand.expr = _weighing(operand.expr)
        return node

    def visit_Pair(self, node: jinja2.nodes.Pair) -> jinja2.nodes.Node:
        self.generic_visit(node)
        node.key = _weighing(node.key)
        return node

    def visit_Concat(self, node: jinja2.nodes.Concat) -> jinja2.nodes.Node:
        self.generic_visit(node)
        return _filtered(jinja2.nodes.Tuple(node.nodes, "load"), _CONCAT)


def _weighing(node: jinja2.nodes.Expr) -> jinja2.nodes.Expr:
    """Return an expression that also weighs the value of `node`, unless the value cannot be a container."""
    nodes = jinja2.nodes
    if (
        isinstance(node, nodes.TemplateData | nodes.Const | nodes.Compare | nodes.Not | nodes.Test | nodes.Sub)
        or (isinstance(node, nodes.Add) and any(isinstance(part, nodes.Const) for part in (node.left, node.right)))
        or (isinstance(node, nodes.Getattr) and isinstance(node.node, nodes.Name) and node.node.name == "loop")
        or (isinstance(node, nodes.Filter) and node.name in _TEXT_FILTERS)
    ):
        return node
    return _filtered(node, _WEIGHED)


def _made(value: Any) -> Any:
    """Count a part of a text or list. It is not larger than the whole, which was counted."""
    _tick()
    _count(_size(value))
    return value


def _filtered(node: jinja2.nodes.Expr, name: str) -> jinja2.nodes.Filter:
    return jinja2.nodes.Filter(node, name, [], [], None, None)


def _written(parts: Iterable[Any]) -> str:
    return _concat([part if type(part) is str else str(weighed(part)) for part in parts])


_COMPARING_TESTS: Final = frozenset(
    ("eq", "==", "equalto", "ne", "!=", "lt", "<", "lessthan", "le", "<=", "gt", ">", "greaterthan", "ge", ">=", "in")
)


def _weighing_test(test: Any) -> Callable[..., Any]:
    return lambda value, other: test(weighed(value), weighed(other))


class Environment(ImmutableSandboxedEnvironment):
    """A Jinja sandbox with the limits of this module. Compile a template with `guarded`, and render it within
    `bounded`."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})
    concat = staticmethod(_concat)

    def __init__(
        self, extensions: Sequence[type[jinja2.ext.Extension]], filters: Mapping[str, Callable[..., Any]]
    ) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
        self.globals = {name: self.globals[name] for name in GLOBALS}
        self.tests = {
            name: _weighing_test(test) if name in _COMPARING_TESTS else test for name, test in self.tests.items()
        }
        self.filters = {name: _guarded(function, name) for name, function in {**self.filters, **filters}.items()}
        self.filters |= {"join": _join_filter, _ROUND: _round, _CONCAT: _written, _WEIGHED: weighed, _MADE: _made}

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
        if type(__obj) is not jinja2.runtime.Macro:
            subject = getattr(__obj, "__self__", None)
            if isinstance(subject, _TEXTS):
                if (grows := _GROWING_METHODS.get(__obj.__name__)) is not None:
                    grows(subject, *args, **named)
                elif __obj.__name__ == "join":
                    args = (_joined(args[0], subject),)
                else:
                    _count(3 * len(subject))
            elif isinstance(subject, _CONTAINERS):
                _count(_size(subject))
            elif isinstance(subject, (int, type)):  # int.from_bytes
                for value in args:
                    _whole_number(value)
            if args or named:
                __self._check_arguments(subject, (*args, *named.values()))
        return super().call(__context, __obj, *args, **named)

    def _check_arguments(self, subject: Any, values: Sequence[Any]) -> None:
        """Check the arguments of a function or method that is not a macro of the template."""
        _small(values)
        for value in values:
            if isinstance(value, _CONTAINERS):
                _charge(_size(value))  # dict() copies it
                if subject is not None:
                    weighed(value)  # a method compares or hashes it
                    weighed(subject)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        wrapped = super().wrap_str_format(value)
        if wrapped is None:
            return None

        def checked(*args: Any, **named: Any) -> str:
            _fields(value.__self__, *args, **named)
            return wrapped(*args, **named)

        return checked

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "%":
            _fields(left, *(right if isinstance(right, tuple) else (right,)))
        elif operator == "+":
            if isinstance(left, str) and isinstance(right, str):
                _charge(len(left) + len(right))
                return left + right
            _charge(_size(left) + _size(right))
        elif isinstance(left, int) and isinstance(right, int):
            bits = left.bit_length() * max(right, 1) if operator == "**" else left.bit_length() + right.bit_length()
            if bits > MAX_BITS:
                raise RenderLimitExceeded(f"a number of more than {MAX_BITS} bits")
        elif operator == "*":
            for sequence, times in ((left, right), (right, left)):
                if isinstance(times, int):
                    _charge(_size(sequence) * max(times, 0))
        return super().call_binop(context, operator, left, right)
