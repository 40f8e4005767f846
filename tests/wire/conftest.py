"""Fixtures that the gateway's tests also use: a checkpoint, the checkpoint's bundle and a cluster."""

from tests.gateway.conftest import bundle, checkpoint, cluster

__all__ = ["bundle", "checkpoint", "cluster"]
