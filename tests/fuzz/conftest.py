"""Fixtures: a cluster on the simulated engine, shared with the gateway's tests."""

from tests.gateway.conftest import bundle, checkpoint

__all__ = ["bundle", "checkpoint"]
