"""Traces of calls through a real gateway and real links, as a real OTLP receiver gets them."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from opentelemetry import trace as otel
from opentelemetry.sdk.trace import TracerProvider
from structlog.testing import capture_logs

from cluster.client import AsyncClient, Client
from cluster.ledger.rows import UsageQuery
from cluster.observe import semantic_conventions as names
from cluster.v1 import inference_pb2 as pb
from cluster.wire.bundle import Bundle
from cluster.wire.dial import read
from tests.support.calls import chat, complete, refused, rest_of, resume, text_of
from tests.support.cluster import LOOPBACK, TestCluster, Worker, running_cluster, sim_engine, until
from tests.support.http import chat_body, fetch
from tests.support.keyed import bearer, keyed_cluster
from tests.support.otlp import Collector, ReceivedSpan
from tests.support.parsed_outputs import ParsedByEngine
from tests.support.parts_engine import PartsEngine
from tests.support.pooling import EMBEDDER

pytestmark = pytest.mark.slow

TRACE_ID, CALLER = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
SAMPLED, NOT_SAMPLED = f"00-{TRACE_ID}-{CALLER}-01", f"00-{TRACE_ID}-{CALLER}-00"


def tracing(collector: Collector, **more: Any) -> str:
    """Return the configuration section `observe` that traces all calls."""
    return f"observe: {json.dumps({'tracing': {'endpoint': collector.endpoint, 'sample_ratio': 1.0, **more}})}\n"


@asynccontextmanager
async def traced_cluster(tmp_path: Path, collector: Collector, **more: Any) -> AsyncIterator[TestCluster]:
    """Run a gateway that traces all calls."""
    async with running_cluster(tmp_path, LOOPBACK + tracing(collector, **more)) as cluster:
        yield cluster


async def kill(worker: Worker) -> None:
    """End a worker without a message to the gateway, like a crash of its process."""
    worker.task.cancel()
    await asyncio.gather(worker.task, return_exceptions=True)


def only(spans: Sequence[ReceivedSpan], name: str) -> ReceivedSpan:
    """Return the only span with this name."""
    (span,) = [each for each in spans if each.name == name]
    return span


async def test_a_call_is_followed_from_its_caller_to_the_ledger_over_a_resume(
    tmp_path: Path, checkpoint: Path, bundle: Bundle, collector: Collector
) -> None:
    """If a call is resumed after its worker was killed in mid-stream, the trace id that the caller has chosen is in the
    gateway's spans, in the spans of both workers, in the access line and in the usage record."""
    async with keyed_cluster(tmp_path, tracing(collector)) as keyed:
        cluster, places = keyed.cluster, {}
        assert keyed.gateway.dispatch.accounting is not None
        keyed.gateway.dispatch.accounting._grace_s = 0.1  # the killed worker never reports its counts
        for pod in ("pod-a", "pod-b"):
            engine = sim_engine(checkpoint, decode_ms=5)
            worker = await cluster.add_worker(engine, bundle, pod=pod, host=f"node-of-{pod}")
            places[worker.identity.worker_id] = (worker, pod)
        key = await keyed.key("acme")
        request = chat("Tell me a secret about Zanzibar", max_tokens=60, ignore_eos=True)
        metadata = (*bearer(key), ("traceparent", SAMPLED), ("tracestate", "vendor=x"), ("x-request-id", "r-1"))
        with capture_logs() as lines:
            call = cluster.stub.StreamChat(request, metadata=metadata)
            chunks = [await read(call) for _ in range(5)]
            (link,) = [link for link in cluster.gateway.hub.links if link.slots.sinks]
            first = link.identity.worker_id
            await kill(places[first][0])
            chunks += await rest_of(call)
            await until(lambda: any(line["event"] == "call.ended" for line in lines), "the access line is written")
        assert chunks[-1].usage.completion_tokens == 60
        assert chunks[-1].usage.resumed == 1

        (root,) = await collector.until_calls(1)
        spans = collector.of_trace(TRACE_ID)
        assert len(spans) == len(collector.spans)
        _check_tree(root, spans)
        assert (root.name, root.parent, root.span.trace_state) == ("chat sim", CALLER, "vendor=x")
        assert {name: root[name] for name in (names.TENANT, names.REQUEST_ID, names.OUTCOME, names.RESUMES)} == {
            names.TENANT: "acme", names.REQUEST_ID: "r-1", names.OUTCOME: "ok", names.RESUMES: 1,
        }  # fmt: skip
        assert root[names.OUTPUT_TOKENS] == 60
        assert root[names.FINISH_REASONS] == ["length"]

        lost, resumed = (span for span in spans if span.name == names.ATTEMPT)
        (second,) = places.keys() - {first}
        assert (lost[names.WORKER], resumed[names.WORKER]) == (first, second)
        assert (lost[names.POD], lost[names.NODE]) == (places[first][1], f"node-of-{places[first][1]}")
        assert (lost[names.ATTEMPT_END], lost.is_error) == ("lost", True)
        assert (resumed[names.ATTEMPT_END], resumed.is_error) == ("finished", False)
        assert lost[names.TOKENS] + resumed[names.TOKENS] == 60
        assert resumed[names.TOKENS_BEFORE] == lost[names.TOKENS] > 0
        assert resumed.links == [lost.id]
        wait = only(spans, names.RESUME)
        assert (wait[names.WAIT_REASON], wait.links) == ("lost", [lost.id, resumed.id])
        assert lost.end_s - 0.001 <= wait.start_s
        assert wait.end_s <= resumed.end_s + 0.001
        for attempt in (lost, resumed):
            below = {span.name: span for span in spans if span.parent == attempt.id}
            assert below.keys() >= {names.ROUTE, names.PREFILL, names.DECODE}
            assert below[names.ROUTE][names.ROUTE_REASON]
            assert below[names.PREFILL].resource[names.SERVICE_INSTANCE] == attempt[names.WORKER]
            assert below[names.PREFILL][names.MEASURED_BY] == "worker"
            assert [event.name for event in attempt.span.events] == [names.FIRST_TOKEN]

        (line,) = [line for line in lines if line["event"] == "call.ended"]
        assert (line["trace_id"], line["request_id"], line["worker"]) == (TRACE_ID, "r-1", second)

        everything = "".join(str(span.span) + str(span.resource) for span in spans)
        assert "Zanzibar" not in everything
        assert text_of(chunks).strip()[:20] not in everything

        def records() -> list[Any]:
            return list(keyed.ledger.usage.records(UsageQuery(tenant="acme")))

        await until(lambda: bool(records()), "the usage record is in the database")
        (record,) = records()
        assert (record.trace_id, record.request_id, record.worker) == (TRACE_ID, "r-1", second)


def _check_tree(root: ReceivedSpan, spans: Sequence[ReceivedSpan]) -> None:
    """Check that every span is a descendant of the call's span and lies within its time."""
    known = {span.id: span for span in spans}
    for span in spans:
        if span is not root:
            assert span.parent in known, span.name
            assert root.start_s - 1e-6 <= span.start_s <= span.end_s <= root.end_s + 1e-6


async def test_every_api_passes_the_callers_context_on(
    tmp_path: Path, checkpoint: Path, bundle: Bundle, collector: Collector
) -> None:
    """Each call is in the trace that its `traceparent` names: over gRPC, in a gRPC session, and over OpenAI's and
    Anthropic's API. The SDK sends the context of the program's current OpenTelemetry span."""
    async with traced_cluster(tmp_path, collector, sample_ratio=0.0) as cluster:
        await cluster.add_worker(sim_engine(checkpoint), bundle)

        def context(number: int) -> str:
            return f"00-{number:032x}-{CALLER}-01"

        await cluster.stub.Complete(complete(), metadata=(("traceparent", context(1)),))
        session = cluster.stub.Session(metadata=(("traceparent", context(2)),))
        await session.write(pb.SessionRequest(start=pb.SessionStart(call_id=1, chat=chat())))
        start = pb.SessionStart(call_id=2, chat=chat(), traceparent=context(3), tracestate="a=1")
        await session.write(pb.SessionRequest(start=start))
        await session.done_writing()
        await rest_of(session)
        await fetch(cluster, "/v1/chat/completions", chat_body(), traceparent=context(4))
        anthropic = {"model": "sim", "max_tokens": 4, "messages": [{"role": "user", "content": "Hi"}]}
        await fetch(cluster, "/v1/messages", anthropic, traceparent=context(5), tracestate="b=2")
        endpoint = cluster.gateway.endpoints["grpc"]
        tracer = TracerProvider().get_tracer("test")
        async with AsyncClient(endpoint) as client:
            spans = [tracer.start_span("program") for _ in range(2)]
            with otel.use_span(spans[0]):
                one = client.stream_chat("sim", "Hi", max_tokens=8)
            with otel.use_span(spans[1]):  # in a session, which begins while another stream runs
                other = client.stream_chat("sim", "Hi", max_tokens=8)
            for stream in (one, other):
                assert "".join([text async for text in stream])
            await client.chat("sim", "Hi", headers={"traceparent": context(6)}, max_tokens=2)
            await client.chat("sim", "untraced", max_tokens=2)

        def with_sync_client() -> None:
            with Client(endpoint) as client, otel.use_span(third):
                client.chat("sim", "Hi", max_tokens=2)

        third = tracer.start_span("program")
        await asyncio.to_thread(with_sync_client)
        wanted = {f"{number:032x}" for number in range(1, 7)}
        wanted |= {f"{span.get_span_context().trace_id:032x}" for span in (*spans, third)}
        roots = await collector.until_calls(len(wanted))
        assert {root.trace for root in roots} == wanted
        states = {root.trace: root.span.trace_state for root in roots}
        assert (states[f"{3:032x}"], states[f"{5:032x}"], states[f"{4:032x}"]) == ("a=1", "b=2", "")


async def test_the_caller_or_the_ratio_decides(
    tmp_path: Path, checkpoint: Path, bundle: Bundle, collector: Collector
) -> None:
    """The sampled flag of the caller's trace decides whether a call is sampled. Without a caller's trace, the ratio
    decides. A call that is not sampled has no trace record, but the caller's trace id is kept for the logs of gateway
    and worker."""
    async with traced_cluster(tmp_path, collector) as cluster:
        worker = await cluster.add_worker(sim_engine(checkpoint), bundle)
        submitted: list[str] = []
        submit = worker.engine.submit

        async def record(request: Any) -> None:
            submitted.append(request.traceparent)
            await submit(request)

        worker.engine.submit = record  # type: ignore[method-assign]
        call = cluster.stub.StreamChat(chat(), metadata=(("traceparent", NOT_SAMPLED),))
        await read(call)
        (open_call,) = cluster.gateway.service.calls
        assert (open_call.trace, open_call.trace_id) == (None, TRACE_ID)
        await rest_of(call)
        await cluster.stub.Chat(chat())
        await cluster.stub.Chat(chat(), metadata=(("traceparent", "nonsense"),))
        roots = await collector.until_calls(2)
        assert TRACE_ID not in {root.trace for root in roots}
        assert submitted[0] == NOT_SAMPLED
        attempts = {span.id: span.trace for span in collector.spans if span.name == names.ATTEMPT}
        assert {text.split("-")[2]: text.split("-")[1] for text in submitted[1:]} == attempts


async def test_a_call_that_its_client_resumes_stays_in_its_trace(
    tmp_path: Path, checkpoint: Path, bundle: Bundle, collector: Collector
) -> None:
    """A client resumes a stream with resume tokens and names no trace. The second call is still in the trace of the
    first, below the first call's span, and begins with a resume span."""
    async with traced_cluster(tmp_path, collector) as cluster:
        await cluster.add_worker(sim_engine(checkpoint, decode_ms=5), bundle)
        request = chat(max_tokens=40, ignore_eos=True, resumable=True)
        call = cluster.stub.StreamChat(request)
        chunks = [await read(call) for _ in range(5)]
        call.cancel()
        (first,) = await collector.until_calls(1)
        await rest_of(cluster.stub.Resume(resume(request, chunks)))
        _, second = await collector.until_calls(2)
        assert (second.trace, second.parent, second[names.IS_CONTINUED]) == (first.trace, first.id, True)
        waited = only(collector.of_trace(first.trace), names.RESUME)
        assert (waited.parent, waited[names.WAIT_REASON]) == (second.id, "gateway")
        assert waited[names.TOKENS_BEFORE] > 0


async def test_callers_may_be_ignored(tmp_path: Path, checkpoint: Path, bundle: Bundle, collector: Collector) -> None:
    """Without `follow_caller`, only `sample_ratio` decides which calls are traced, whether or not the caller's own
    trace is sampled."""
    async with traced_cluster(tmp_path, collector, follow_caller=False, sample_ratio=0.0) as cluster:
        await cluster.add_worker(sim_engine(checkpoint), bundle)
        await cluster.stub.Chat(chat(), metadata=(("traceparent", SAMPLED),))
        await cluster.gateway.stop(0)
    assert collector.spans == []


async def test_refused_and_failed_calls_are_traced(
    tmp_path: Path, checkpoint: Path, bundle: Bundle, collector: Collector
) -> None:
    """A call of an unknown model, an invalid call and a call whose client disconnects have traces that say how they
    ended. Only the first two count as errors. Error messages, which may quote the request, are not in the trace."""
    async with traced_cluster(tmp_path, collector) as cluster:
        await cluster.add_worker(sim_engine(checkpoint, decode_ms=5), bundle)
        await refused(cluster.stub.Chat(chat(model="no-such-model")))
        await refused(cluster.stub.Chat(chat(temperature=9.75)))
        call = cluster.stub.StreamChat(chat(max_tokens=2000, ignore_eos=True))
        await read(call)
        call.cancel()
        await cluster.until_idle()
        unknown, invalid, left = sorted(await collector.until_calls(3), key=lambda span: span.start_s)
        assert (unknown.name, unknown[names.ERROR_TYPE], unknown.is_error) == ("chat", "model_not_found", True)
        assert (invalid[names.ERROR_TYPE], invalid.is_error) == ("invalid_field", True)
        assert "9.75" not in str(invalid.span).replace(str(invalid.get(names.REQUEST_TEMPERATURE)), "")
        assert (left[names.OUTCOME], left.is_error, left.get(names.ERROR_TYPE)) == ("cancelled", False, None)
        (attempt,) = [span for span in collector.of_trace(left.trace) if span.name == names.ATTEMPT]
        assert (attempt[names.ATTEMPT_END], attempt.is_error) == ("aborted", False)


async def test_parsed_and_pooled_calls_are_traced(
    tmp_path: Path, checkpoint: Path, bundle: Bundle, collector: Collector
) -> None:
    """A chat whose output is parsed has times from its worker like any other chat. A pooling call has an attempt for
    each input, up to a bound."""
    async with traced_cluster(tmp_path, collector) as cluster:
        await cluster.add_worker(sim_engine(checkpoint, **EMBEDDER), bundle, model="embed")
        await cluster.stub.Embed(pb.EmbedRequest(model="embed", texts=["one", "two", "three"]))
        (embedding,) = await collector.until_calls(1)
        assert (embedding.name, embedding[names.OPERATION]) == ("embeddings embed", "embeddings")
        attempts = [span for span in collector.of_trace(embedding.trace) if span.name == names.ATTEMPT]
        assert sorted(span[names.SEQUENCE] for span in attempts) == [0, 1, 2]
        assert {span[names.ATTEMPT_END] for span in attempts} == {"finished"}
        await cluster.add_worker(PartsEngine([[]] * 8), bundle, parser=ParsedByEngine())
        tools = [pb.Tool(name="weather", parameters_json='{"type": "object"}')]
        await cluster.stub.Chat(chat(max_tokens=8, tools=tools))
        _, root = await collector.until_calls(2)
        spans = collector.of_trace(root.trace)
        assert only(spans, names.DECODE)[names.MEASURED_BY] == "worker"


async def test_a_collector_that_is_away_slows_no_call(
    tmp_path: Path, checkpoint: Path, bundle: Bundle, collector: Collector
) -> None:
    """While nothing listens at the collector's address, calls are answered, the queue of spans stays within its bound,
    and every span is counted as dropped or failed."""
    async with traced_cluster(tmp_path, collector, max_queued_spans=512) as cluster:
        collector.refusal = grpc.StatusCode.PERMISSION_DENIED
        await cluster.add_worker(sim_engine(checkpoint, decode_ms=0.1), bundle)
        export = cluster.gateway.foundation.span_export
        assert export is not None
        await asyncio.gather(*(cluster.stub.Chat(chat(max_tokens=2)) for _ in range(200)))
        assert len(export._queue) <= 512

        def counted() -> dict[tuple[str, ...], float]:
            return dict(cluster.gateway.metrics._counters.get("spans_total", {}))

        await until(lambda: sum(counted().values()) >= 200 * 6, "every span is counted")
        assert ("exported",) not in counted()
        collector.refusal = None
        await cluster.stub.Chat(chat(max_tokens=2))
        await collector.until_calls(1)
        await until(lambda: counted().get(("exported",), 0) >= 6, "the spans of the last call are counted")
