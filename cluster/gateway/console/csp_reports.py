"""Browsers' reports that a page has violated the content security policy. All reports are counted, and at most
LINES_PER_S of them are logged each second.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

import orjson
import structlog

from cluster.gateway.apis.http.body import RequestBodies
from cluster.gateway.apis.http.exchange import Exchange
from cluster.gateway.apis.http.protocol import CONNECTION
from cluster.gateway.calls.records.access_log import LineBudget
from cluster.gateway.console.access.sign_in import no_content
from cluster.observe.metrics import Metrics

log = structlog.get_logger("console")

MAX_CHARS: Final = 200
LINES_PER_S: Final = 1


class CspReports:
    """The endpoint for browsers' reports of violations of the content security policy. Anybody may send a report, so a
    report only affects the count and the log."""

    def __init__(self, bodies: RequestBodies, metrics: Metrics, clock: Callable[[], float]) -> None:
        """`clock`: monotonic seconds."""
        self._bodies = bodies
        self._metrics = metrics
        self._clock = clock
        self._lines = LineBudget(LINES_PER_S)
        metrics.count("console_csp_reports_total", by=0)  # so that the first report is an increase

    async def report(self, exchange: Exchange) -> None:
        """Count a report, and log it if the limit of LINES_PER_S allows."""
        length = exchange.headers.get(b"content-length", b"")
        async with self._bodies.read(exchange.receive, exchange.scope[CONNECTION], length, "") as content:
            fields = _fields(bytes(content))
        self._metrics.count("console_csp_reports_total")
        left_out = self._lines.take(self._clock())
        if left_out is not None:
            log.warning("console.csp_reported", **fields, not_logged_before=left_out)
        await no_content(exchange)


def _fields(content: bytes) -> Mapping[str, str]:
    """Return the fields of a report for the log line. The report's sample of the page's text is left out, since it may
    hold a prompt."""
    try:
        body = orjson.loads(content)
    except orjson.JSONDecodeError:
        body = None
    report: Any = body.get("csp-report") if isinstance(body, dict) else None
    if not isinstance(report, dict):
        report = {}
    names = {"directive": "effective-directive", "blocked": "blocked-uri", "source": "source-file"}
    return {name: _text(report.get(key)) for name, key in names.items()}


def _text(value: object) -> str:
    return "".join(filter(str.isprintable, value[:MAX_CHARS])) if isinstance(value, str) else ""
