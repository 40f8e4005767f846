"""Spans as trees in plain text."""

from __future__ import annotations

from dataclasses import replace

from cluster.cli.span_trees import trees
from cluster.observe import semantic_conventions as names
from cluster.observe.spans import SpanEvent, SpanKind, SpanRecord


def span(name: str, span_id: str, parent: str, start: float, end: float, error: str = "", **more: str) -> SpanRecord:
    """Return a span of one trace. `more`: attributes of the span, by the names of the constants that hold the
    attributes' keys."""
    attributes = {getattr(names, key): value for key, value in more.items()}
    kind = SpanKind.INTERNAL if parent else SpanKind.SERVER
    return SpanRecord(name, "a" * 32, span_id, parent, start, end, {}, kind, attributes, error=error)


def test_a_call_is_one_tree_in_the_order_of_time() -> None:
    """Each span has a line below its parent's line, with its start, its duration and a few attributes.

    A failed span has a mark. A span without its parent in the trace begins a tree of its own.
    """
    shown = list(
        trees(
            [
                replace(
                    span("attempt", "3", "1", 10.2, 11.5, "lost", WORKER="w1", ATTEMPT_END="lost"),
                    events=[SpanEvent(names.FIRST_TOKEN, 10.9)],
                ),
                span("chat m", "1", "caller", 10.0, 12.0, OUTCOME="ok", TENANT="acme"),
                span("prefill", "4", "3", 10.3, 10.9),
                span("admission", "2", "1", 10.0, 10.1),
                span("queue", "9", "8", 20.0, 20.5),
            ]
        )
    )
    assert shown == [
        "\n".join(
            (
                f"trace {'a' * 32}",
                "  chat m                        +0.0 ms     2.00 s  ok, tenant acme",
                "  ├─ admission                  +0.0 ms   100.0 ms",
                "  └─ attempt!                 +200.0 ms     1.30 s  lost, worker w1, first token +900.0 ms",
                "     └─ prefill               +300.0 ms   600.0 ms",
            )
        ),
        f"trace {'a' * 32}\n  queue                         +0.0 ms   500.0 ms",
    ]
