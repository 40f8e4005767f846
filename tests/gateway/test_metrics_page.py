"""The metrics endpoint of a process: content negotiation, and the cost of many scrapers."""

from __future__ import annotations

import asyncio
import gzip
import threading
from collections.abc import Iterator

import pytest

from cluster.gateway.metrics_page import metrics_served
from cluster.observe.exposition import samples
from cluster.observe.metrics import Metrics, Sample

HEAD = "GET {path} HTTP/1.1\r\nhost: a\r\nconnection: close\r\n{more}\r\n"


async def scrape(port: int, more: str = "", path: str = "/metrics") -> tuple[str, bytes]:
    """Return the head and the body of the answer to a scrape."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(HEAD.format(path=path, more=more).encode())
    head, _, body = (await asyncio.wait_for(reader.read(), 60)).partition(b"\r\n\r\n")
    writer.close()
    return head.decode(), body


async def test_scrapers_get_the_form_that_they_ask_for() -> None:
    """Scrapers get the format that they request. Prometheus requests OpenMetrics and gzip."""
    metrics = Metrics("c")
    metrics.count("rejected_total", "m", "queue_full", by=3)
    async with metrics_served(metrics, "127.0.0.1", 0) as port:
        head, body = await scrape(port)
        assert "content-type: text/plain" in head
        assert (
            "headrace_rejected_total",
            {"headrace_cluster": "c", "model": "m", "reason": "queue_full"},
            3.0,
        ) in samples(body.decode())
        head, body = await scrape(
            port, "accept: application/openmetrics-text;version=1.0.0\r\naccept-encoding: gzip\r\n"
        )
        assert "content-type: application/openmetrics-text" in head
        assert gzip.decompress(body).endswith(b"# EOF\n")
        head, _ = await scrape(port, path="/")
        assert head.startswith("HTTP/1.1 200 ")


@pytest.mark.alone
async def test_idle_connections_take_no_thread_and_scrapes_at_once_share_a_page() -> None:
    """Idle connections need no thread, and simultaneous scrapes share one page. Formerly 300 idle connections had 300
    threads."""
    metrics, made = Metrics("c"), 0
    go = threading.Event()

    def gauges() -> Iterator[Sample]:
        nonlocal made
        made += 1
        go.wait(60)
        yield "limits_degraded", (), 0.0

    metrics.add_gauges(gauges)
    before = threading.active_count()
    async with metrics_served(metrics, "127.0.0.1", 0) as port:
        idle = [await asyncio.open_connection("127.0.0.1", port) for _ in range(100)]
        scrapes = [asyncio.create_task(scrape(port)) for _ in range(20)]
        while not made:
            await asyncio.wait(scrapes, timeout=0.01)
        assert not any(one.done() for one in scrapes)
        assert threading.active_count() <= before + 2
        go.set()
        assert {head.partition("\r\n")[0] for head, _ in await asyncio.gather(*scrapes)} == {"HTTP/1.1 200 OK"}
        assert made <= 20 // 2
        for _, writer in idle:
            writer.close()
