"""A checkpoint and its bundle, shared with the gateway's tests."""

from tests.gateway.conftest import bundle, checkpoint, cluster

__all__ = ["bundle", "checkpoint", "cluster"]
