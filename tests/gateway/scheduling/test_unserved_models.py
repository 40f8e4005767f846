"""When a first call waits for a model without workers, the demand is reported at once. Further calls cause no
report."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from cluster.gateway.scheduling.pump import UnservedModels


def model(name: str, *, served: bool) -> Any:
    """Return a model."""
    return SimpleNamespace(name=name, served=served)


def test_the_first_call_is_reported() -> None:
    """A model without workers is reported once. It is reported again only after workers have served it in between."""
    reports: list[int] = []
    unserved = UnservedModels(lambda: reports.append(1))
    unserved.note(model("a", served=True))
    assert not reports
    for _ in range(2):
        unserved.note(model("a", served=False))
    unserved.note(model("b", served=False))
    assert len(reports) == 2
    unserved.retain([model("a", served=True), model("b", served=False)])
    for name in "ab":
        unserved.note(model(name, served=False))
    assert len(reports) == 3, "only `a` was served in between"
