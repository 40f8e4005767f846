"""Fixtures that the gateway's tests also use: a model checkpoint, its tokenizer bundle and a cluster."""

from tests.gateway.conftest import bundle, checkpoint, cluster

__all__ = ["bundle", "checkpoint", "cluster"]
