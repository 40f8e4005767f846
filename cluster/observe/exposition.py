"""Parser of /metrics pages in Prometheus' text format."""

from __future__ import annotations

from prometheus_client.parser import text_string_to_metric_families


def samples(text: str) -> list[tuple[str, dict[str, str], float]]:
    """Return (name, labels, value) for every sample on a page. Raises ValueError if the text is not in Prometheus'
    format."""
    families = text_string_to_metric_families(text)
    return [(sample.name, dict(sample.labels), sample.value) for family in families for sample in family.samples]
