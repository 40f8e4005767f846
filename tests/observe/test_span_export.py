"""Export of spans to a real OTLP receiver, and behavior with a collector that is unreachable, refuses spans or changes
its certificate.
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cluster.observe.otlp_receiver import OtlpReceiver
from cluster.observe.span_export import SpanExport, read_headers
from cluster.observe.spans import SpanEvent, SpanKind, SpanRecord
from tests.support.certificates import Authority
from tests.support.cluster import until
from tests.support.otlp import running_collector

RESOURCE = {"service.name": "test"}
NOWHERE = "http://127.0.0.1:1"


def span(number: int = 1, **changed: Any) -> SpanRecord:
    """Return a span with the id `number`."""
    fields = {"name": "chat", "trace_id": "a" * 32, "span_id": f"{number:016x}", "parent_id": "", "start_s": 1.0}
    return SpanRecord(**{**fields, "end_s": 2.0, "resource": RESOURCE, **changed})


class Outcomes(Counter[str]):
    """Counts of spans by outcome, safe for several threads."""

    def __init__(self) -> None:
        super().__init__()
        self._lock = threading.Lock()

    def __call__(self, outcome: str, spans: int) -> None:
        with self._lock:
            self[outcome] += spans


@contextmanager
def exporting(endpoint: str, outcomes: Outcomes, **options: Any) -> Iterator[SpanExport]:
    """Run an exporter that sends its spans without delay."""
    export = SpanExport(endpoint, outcomes, **{"interval_s": 0.01, "timeout_s": 5.0, **options})
    export.start()
    try:
        yield export
    finally:
        export.stop()


names = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=20)
values = st.one_of(
    names, st.booleans(), st.integers(-(2**62), 2**62), st.floats(allow_nan=False), st.lists(names, min_size=1)
)
attributes = st.dictionaries(names, values, max_size=4)
times = st.integers(0, 4_000_000_000_000).map(lambda ms: ms / 1000)
span_ids = st.integers(1, 2**64 - 1).map(lambda number: f"{number:016x}")
spans = st.builds(
    SpanRecord,
    names,
    st.integers(1, 2**128 - 1).map(lambda number: f"{number:032x}"),
    span_ids,
    st.one_of(st.just(""), span_ids),
    times,
    times,
    attributes,
    st.sampled_from(SpanKind),
    attributes,
    st.lists(st.builds(SpanEvent, names, times), max_size=2),
    st.lists(span_ids, max_size=2),
    st.sampled_from(["", "error"]),
    st.sampled_from(["", "vendor=x", "a=1,b=2"]),
)


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(spans, min_size=1, max_size=8))
def test_spans_arrive_as_they_were_sent(sent: list[SpanRecord]) -> None:
    """A receiver gets each exported span once and unchanged, with times exact to ten microseconds. All spans are
    counted as exported."""
    received: list[SpanRecord] = []
    receiver = OtlpReceiver("127.0.0.1:0", lambda some: received.extend(some))
    receiver.start()
    outcomes = Outcomes()
    try:
        with exporting(f"http://{receiver.address}", outcomes) as export:
            export.add(sent)
    finally:
        receiver.stop()

    def key(each: SpanRecord) -> Any:
        events = [replace(event, at_s=round(event.at_s, 5)) for event in each.events]
        same = replace(each, start_s=round(each.start_s, 5), end_s=round(each.end_s, 5), events=events)
        return (each.trace_id, each.span_id, each.name, repr(same))

    assert sorted(map(key, received)) == sorted(map(key, sent))
    assert outcomes == {"exported": len(sent)}


async def test_a_queue_that_is_full_drops_whole_calls(tmp_path: Path) -> None:
    """While the collector does not answer, at most `max_queued` spans wait. The spans of a call are either all queued
    or all dropped, `add` returns at once, and in the end every span is counted once."""
    outcomes = Outcomes()
    with exporting(NOWHERE, outcomes, max_queued=1000, timeout_s=0.2, interval_s=60.0) as export:
        for call in range(100):
            export.add([span(call * 30 + at + 1) for at in range(30)])
        assert len(export._queue) <= 1000
    assert outcomes["dropped"] % 30 == 0
    assert outcomes["failed"] > 0
    assert outcomes.total() == 3000
    assert "exported" not in outcomes


async def test_a_collector_that_comes_back_gets_the_next_spans() -> None:
    """Spans that the collector refuses are counted as failed. When the collector accepts spans again, later spans
    arrive."""
    outcomes = Outcomes()
    async with running_collector() as collector:
        collector.refusal = grpc.StatusCode.INVALID_ARGUMENT
        with exporting(collector.endpoint, outcomes) as export:
            export.add([span(1), span(2)])
            await until(lambda: outcomes["failed"] == 2, "the refusal is counted")
            collector.refusal = None
            export.add([span(3)])
            await until(lambda: outcomes["exported"] == 1, "the next span is sent")
        assert [received.id for received in collector.spans] == [f"{3:016x}"]


def _read(path: str | Path) -> bytes:
    return Path(path).read_bytes()


async def test_tls_and_headers_are_read_again_when_they_change(tmp_path: Path) -> None:
    """A batch is sent only if the collector's certificate is signed by the CA in `ca_file`. Each batch has the headers
    that the headers file holds at that time."""
    authority = Authority(tmp_path / "ca")
    files = authority.issue("localhost")
    pair = (_read(files.key_file), _read(files.cert_file))
    headers, ca, outcomes = tmp_path / "headers", Path(files.ca_file), Outcomes()
    headers.write_text("# of the vendor\nX-Api-Key: one: two\n\n")
    async with running_collector(grpc.ssl_server_credentials([pair])) as collector:
        with exporting(collector.endpoint, outcomes, ca_file=ca, headers_file=headers) as export:
            export.add([span(1)])
            await until(lambda: outcomes["exported"] == 1, "the first span is sent")
            headers.write_text("x-api-key: three\n")
            os.utime(headers, (1, 1))
            export.add([span(2)])
            await until(lambda: outcomes["exported"] == 2, "the second span is sent")
        assert [each["x-api-key"] for each in collector.metadata] == ["one: two", "three"]
        stranger = Path(Authority(tmp_path / "other").issue("other").ca_file)
        with exporting(collector.endpoint, outcomes, ca_file=stranger, timeout_s=1.0) as export:
            export.add([span(3)])
            await until(lambda: outcomes["failed"] == 1, "the connection is refused")
    assert len(collector.spans) == 2


@pytest.mark.parametrize(
    ("text", "problem"),
    [("no colon", "line 1: write `name: value`"), ("ok: 1\nb d: 2", "line 2"), ("k: ä", "ASCII"), (": x", "line 1")],
)
def test_an_unusable_headers_file_is_named(tmp_path: Path, text: str, problem: str) -> None:
    """The error for an invalid headers file names the file and the line. The error for a missing file names the setting
    and the file."""
    path = tmp_path / "headers"
    path.write_text(text)
    with pytest.raises(ValueError, match=problem) as refused:
        read_headers(path, "observe.tracing.headers_file")
    assert str(path) in str(refused.value)
    with pytest.raises(ValueError, match=r"observe\.tracing\.headers_file: .*missing cannot be read"):
        SpanExport(NOWHERE, Outcomes(), headers_file=tmp_path / "missing")
    with pytest.raises(ValueError, match=r"observe\.tracing\.ca_file: .*missing cannot be read"):
        SpanExport("https://127.0.0.1:1", Outcomes(), ca_file=tmp_path / "missing")


@pytest.mark.slow
async def test_the_end_does_not_wait_for_a_collector_that_hangs() -> None:
    """`stop` returns even if the collector accepts connections and never answers. No span then counts as exported."""

    async def read_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()

    server = await asyncio.start_server(read_on, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    outcomes = Outcomes()
    export = SpanExport(f"http://127.0.0.1:{port}", outcomes, interval_s=0.01, timeout_s=600.0)
    export.start()
    export.add([span(number) for number in range(1, 700)])
    await until(lambda: len(export._queue) < 699, "the first batch is under way")
    export.add([span(number) for number in range(700, 800)])
    await asyncio.to_thread(export.stop)
    assert outcomes["exported"] == 0
    server.close()
