"""Detection of the content format of a chat template: plain text, or a list of parts.

Problem: callers send the content of a message as a text or as parts. A template that loops over the parts of a content
must get parts. Any other template must get a text. Templates do not declare which of the two forms they take.

Source: the rules of vLLM 0.32 (`renderers/hf.py`, `_detect_content_format`), in the same order. A template takes parts
if it has a loop over the content of a message, or over a variable or a macro's argument that holds such a content.
"""

from __future__ import annotations

from collections.abc import Iterator

from jinja2 import nodes


class _Undecided(Exception):
    """Raised for a template that assigns to something other than a plain name, by `set` or by a loop.

    Such a template gets message contents as texts, not as lists of parts.
    """


def takes_parts(tree: nodes.Template) -> bool:
    """Return whether the template takes contents as lists of parts. `tree`: the parsed template."""
    try:
        return next(_content_loops(tree), None) is not None
    except _Undecided:
        return False


def _reads(node: nodes.Node, variable: str, key: str = "") -> bool:
    """Return whether an expression reads a variable. If `key` is given, return whether it reads the member `key` of the
    variable. Filters, tests and slices around the variable or member are ignored."""
    match node:
        case nodes.Filter() | nodes.Test():
            return node.node is not None and _reads(node.node, variable, key)
        case nodes.Getitem(arg=nodes.Slice()):
            return _reads(node.node, variable, key)
        case nodes.Getitem() if key:
            return _is_name(node.node, variable) and isinstance(node.arg, nodes.Const) and node.arg.value == key
        case nodes.Getattr() if key:
            return _is_name(node.node, variable) and node.attr == key
        case _:
            return not key and _is_name(node, variable)


def _is_name(node: nodes.Node, name: str) -> bool:
    return isinstance(node, nodes.Name) and node.ctx == "load" and node.name == name


def _name(target: nodes.Node) -> str:
    if not isinstance(target, nodes.Name):
        raise _Undecided
    return target.name


def _aliases(tree: nodes.Template, variable: str) -> list[str]:
    """Return `variable` and all variables to which its value or a slice of the value is assigned, directly or through
    other variables."""
    names = [variable]
    for name in names:  # grows while it is read
        for assigned in tree.find_all(nodes.Assign):
            if _reads(assigned.node, name) and (alias := _name(assigned.target)) not in names:
                names.append(alias)
    return names


def _message_names(tree: nodes.Template) -> list[str]:
    """Return the names of the loop variables that hold one message."""
    lists = _aliases(tree, "messages")
    return [_name(loop.target) for loop in tree.find_all(nodes.For) if any(_reads(loop.iter, name) for name in lists)]


def _content_arguments(macro: nodes.Macro, calls: list[nodes.Call], messages: list[str]) -> set[str]:
    """Return the names of those arguments of a macro that get the content of a message in at least one call."""
    own = [argument.name for argument in macro.args]
    found: set[str] = set()
    for call in calls:
        if not isinstance(call.node, nodes.Name) or call.node.name != macro.name:
            continue
        given = [*zip(own, call.args, strict=False), *((k.key, k.value) for k in call.kwargs if k.key in own)]
        found |= {name for name, value in given if any(_reads(value, message, "content") for message in messages)}
    return found


def _content_loops(tree: nodes.Template) -> Iterator[nodes.For]:
    """Yield the loops over the parts of a content."""
    messages = _message_names(tree)
    calls = list(tree.find_all(nodes.Call))
    in_macro: dict[int, set[str]] = {}
    for macro in tree.find_all(nodes.Macro):
        arguments = _content_arguments(macro, calls, messages)
        for loop in macro.find_all(nodes.For):
            if arguments or id(loop) not in in_macro:
                in_macro[id(loop)] = arguments
    for loop in tree.find_all(nodes.For):
        over, names = loop.iter, in_macro.get(id(loop), {"content"})
        by_name = isinstance(over, nodes.Name) and over.name in names
        if by_name or any(_reads(over, message, "content") for message in messages):
            _name(loop.target)
            yield loop
