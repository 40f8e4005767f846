"""Spans as trees in plain text, one tree for each call."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from cluster.observe import semantic_conventions as names
from cluster.observe.spans import SpanRecord

NAME_WIDTH, TIME_WIDTH = 26, 10
_SHOWN = {
    names.OUTCOME: "",
    names.TENANT: "tenant ",
    names.INPUT_TOKENS: "prompt tokens ",
    names.OUTPUT_TOKENS: "output tokens ",
    names.ATTEMPT_END: "",
    names.WORKER: "worker ",
    names.POD: "pod ",
    names.NODE: "node ",
    names.TOKENS: "tokens ",
    names.ROUTE_REASON: "",
    names.WAIT_REASON: "after ",
    names.PARSER: "parser ",
}
"""Attributes that are shown, in this order, each with the text that is printed before its value."""


def trees(spans: Sequence[SpanRecord]) -> Iterator[str]:
    """Yield one tree as text for each root span, which is a span whose parent is not in `spans`."""
    ids = {span.span_id for span in spans}
    below: dict[str, list[SpanRecord]] = {}
    for span in spans:
        below.setdefault(span.parent_id, []).append(span)
    for root in sorted((span for span in spans if span.parent_id not in ids), key=lambda span: span.start_s):
        yield "\n".join((f"trace {root.trace_id}", *_lines(root, root, below, "", "")))


def _lines(
    span: SpanRecord, root: SpanRecord, below: dict[str, list[SpanRecord]], first: str, rest: str
) -> Iterable[str]:
    """Yield the line of a span, and the lines of the spans below it.

    `first`: tree branches that are drawn before the span's name. `rest`: tree branches that are drawn before the spans
    below this span.
    """
    at, lasts = _duration(span.start_s - root.start_s), _duration(span.end_s - span.start_s)
    parts = [f"{words}{span.attributes[name]}" for name, words in _SHOWN.items() if name in span.attributes]
    parts += [f"{event.name} +{_duration(event.at_s - root.start_s)}" for event in span.events]
    mark = "!" if span.error else ""
    name = f"{first}{span.name}{mark}"
    yield f"  {name:<{NAME_WIDTH}} {'+' + at:>{TIME_WIDTH}} {lasts:>{TIME_WIDTH}}  {', '.join(parts)}".rstrip()
    children = sorted(below.get(span.span_id, ()), key=lambda child: (child.start_s, child.end_s))
    for child in children:
        is_last = child is children[-1]
        before = ("└─ ", "   ") if is_last else ("├─ ", "│  ")
        yield from _lines(child, root, below, rest + before[0], rest + before[1])


def _duration(seconds: float) -> str:
    return f"{seconds * 1000:.1f} ms" if abs(seconds) < 1 else f"{seconds:.2f} s"
