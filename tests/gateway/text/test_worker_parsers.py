"""The parsers of a sequence's workers. A parsed output continues only on a worker with the same parsers."""

from __future__ import annotations

from cluster.api.types import REASONING_PARSER, TOOL_PARSER
from cluster.gateway.text.worker_parsers import WorkerParsers

FIRST = (f"{TOOL_PARSER}hermes", "resume:exact", f"{REASONING_PARSER}qwen3")
OTHER = (f"{TOOL_PARSER}mistral",)


def test_a_worker_with_other_parsers_is_not_accepted() -> None:
    """Once an output is parsed, only a worker with the same parsers may continue it."""
    parsers = WorkerParsers()
    assert parsers.tool_parser == ""
    assert parsers.accept(FIRST, False)
    assert parsers.tool_parser == "hermes"
    assert not parsers.accept(OTHER, True)
    assert not parsers.accept((), True)
    assert parsers.accept((FIRST[0], FIRST[2], "resume:seeded"), True), "other capabilities do not matter"
    assert parsers.tool_parser == "hermes"


def test_any_worker_may_begin_to_parse() -> None:
    """Before a worker has parsed output of a sequence, the gateway accepts any worker, even one without parsers. The
    parsers of the worker that was accepted last are used."""
    parsers = WorkerParsers()
    assert parsers.accept(OTHER, False)
    assert parsers.accept((), False)
    assert parsers.tool_parser == ""
    assert parsers.accept(FIRST, False)
    assert parsers.tool_parser == "hermes"
