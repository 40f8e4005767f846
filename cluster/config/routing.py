"""The `routing` section of cluster.yaml: to which workers a gateway sends calls."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from cluster.config.gateway import Section


class Hedging(Section):
    """Second workers for calls whose first token is late. The first worker to answer keeps the call."""

    share: Annotated[float, Field(ge=0, le=1)] = 0.01
    """Part of a model's calls that may be sent to a second worker; 0: none."""


class Routing(Section):
    """Routing of calls to workers."""

    hedging: Hedging = Hedging()
