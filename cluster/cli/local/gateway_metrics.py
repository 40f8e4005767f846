"""Gateway figures for `status`, read from the /metrics endpoint of each local gateway process.

The admin API has the figures of the first gateway process only, because no other process serves the admin API.
"""

from __future__ import annotations

import http.client
from collections.abc import Mapping, Sequence
from typing import Any

from cluster.observe.exposition import samples as read_samples

TIMEOUT_S = 2.0


def gateway_rows(endpoints: Sequence[Mapping[str, str]]) -> list[dict[str, Any]]:
    """Return one row per gateway process, in the order of `endpoints`.

    In the row of a process that does not answer, `up` is false and the numbers are 0.
    """
    return [_row(process, addresses) for process, addresses in enumerate(endpoints)]


def _row(process: int, addresses: Mapping[str, str]) -> dict[str, Any]:
    samples = scrape(addresses.get("metrics", ""))

    def total(name: str, **labels: str) -> int:
        return int(sum(value for n, given, value in samples or () if n == name and labels.items() <= given.items()))

    waiting: dict[str, int] = {}
    for name, labels, value in samples or ():
        if name == "headrace_queue_requests":
            waiting[labels["model"]] = int(value)
    return {
        "process": process,
        "up": samples is not None,
        "link": addresses.get("link", ""),
        "metrics": addresses.get("metrics", ""),
        "running": total("headrace_requests_in_flight"),
        "waiting": sum(waiting.values()),
        "waiting_by_model": waiting,
        "workers": total("headrace_link_connected", api="worker"),
        "controllers": total("headrace_link_connected", api="controller"),
    }


def scrape(address: str) -> list[tuple[str, dict[str, str], float]] | None:
    """Fetch all samples of a /metrics endpoint, each as (name, labels, value).

    Returns None if the endpoint does not answer.
    """
    host, _, port = address.rpartition(":")
    if host in ("0.0.0.0", "[::]"):  # noqa: S104 - compared, not bound
        host = "127.0.0.1"
    connection = http.client.HTTPConnection(host.strip("[]"), int(port or 0), timeout=TIMEOUT_S)
    try:
        connection.request("GET", "/metrics")
        answer = connection.getresponse()
        text = answer.read().decode()
    except (OSError, http.client.HTTPException):
        return None
    finally:
        connection.close()
    if answer.status != http.client.OK:
        return None
    return read_samples(text)
