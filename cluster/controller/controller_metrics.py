"""The metrics of a controller process. Gauges are computed at each scrape."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from dataclasses import dataclass

import grpc

from cluster import __version__
from cluster.config.schema import Config
from cluster.observe import log
from cluster.observe.metrics import Metrics, Sample
from cluster.wire.certificate_expiry import CertificateExpiry


@dataclass(slots=True)
class ControllerGauges:
    """Computes the gauges of a controller process at each scrape."""

    certificates: CertificateExpiry
    leads: bool = False
    """Whether this controller acts. Of several controllers, only the holder of the Lease acts."""

    def samples(self) -> Iterator[Sample]:
        """Yield the current value of each gauge."""
        yield "build_info", (__version__, platform.python_version(), grpc.__version__), 1
        yield "controller_leading", (), float(self.leads)
        yield "log_lines_dropped_total", (), log.dropped_lines()
        for file, expires_at_s in self.certificates.current():
            yield "certificate_expiry_timestamp_seconds", (str(file),), expires_at_s


def controller_metrics(config: Config) -> tuple[Metrics, ControllerGauges]:
    """Return the metrics of a controller process, and the object that computes the gauges.

    Call this function only once in a process, even if the process runs the controller several times.
    """
    metrics = Metrics(config.name)
    gauges = ControllerGauges(CertificateExpiry.of_link(config.link.tls))
    metrics.add_process_metrics()
    metrics.add_gauges(gauges.samples)
    return metrics, gauges
