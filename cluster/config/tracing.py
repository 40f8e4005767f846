"""The section `observe.tracing` of cluster.yaml."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field, model_validator

from cluster.config.gateway import check_address, is_loopback
from cluster.config.problems import Problem, raise_all
from cluster.config.section import Section


def _collector(value: str) -> str:
    """Return the URL of an OTLP receiver unchanged. Raises ValueError for anything else."""
    parts = urlsplit(value)
    if parts.scheme not in ("http", "https") or not parts.netloc or parts.path.strip("/") or parts.query:
        raise ValueError(f"{value!r} is no URL of a collector's gRPC port: write http://host:4317 or https://host:4317")
    if "@" in parts.netloc:
        raise ValueError("has credentials in it: put them into headers_file")
    check_address(parts.netloc if parts.port is not None else f"{parts.netloc}:4317", least=1)
    return value


class Tracing(Section):
    """OpenTelemetry spans of calls, which the gateways send to a collector by OTLP over gRPC.

    The gateways send the spans of their workers too, so workers need neither this section nor a way to the
    collector."""

    endpoint: Annotated[str, AfterValidator(_collector)]
    """URL of the collector's OTLP port for gRPC: `http://host:4317` without TLS, `https://host:4317` with TLS."""
    ca_file: Path | None = None
    """CA that must have signed the collector's certificate, in PEM. None: the system's CAs."""
    headers_file: Path | None = None
    """File with headers for the collector, such as an API key, one `name: value` a line. Re-read when it changes."""
    sample_ratio: Annotated[float, Field(ge=0, le=1)] = 0.01
    """Share of the calls that are traced, of those without a decision of their caller."""
    follow_caller: bool = True
    """Whether the flag `sampled` in a caller's `traceparent` decides. False: `sample_ratio` decides for all calls."""
    max_queued_spans: Annotated[int, Field(ge=512, le=1_000_000)] = 16_384
    """Spans that wait for the collector in one gateway process. Further spans are dropped and counted."""

    @property
    def is_secure(self) -> bool:
        """Whether the collector is reached by TLS."""
        return self.endpoint.startswith("https:")

    @model_validator(mode="after")
    def _consistent(self) -> Tracing:
        raise_all(tuple(self._problems()))
        return self

    def _problems(self) -> Iterator[Problem]:
        if self.is_secure:
            return
        if self.ca_file is not None:
            yield Problem(("ca_file",), f"is for TLS, and endpoint is {self.endpoint}: write https://, or remove it")
        parts = urlsplit(self.endpoint)
        if self.headers_file is not None and not is_loopback(f"{parts.hostname}:{parts.port or 4317}"):
            yield Problem(
                ("headers_file",), f"would be sent without TLS to {self.endpoint}: write https://, or remove it"
            )
