"""The environment variables that replicas get."""

from __future__ import annotations

import pytest

from cluster.api.types import ModelSpec
from cluster.ray.replica_actor import environment
from cluster.worker.settings import ReplicaSettings


def test_a_replica_keeps_the_network_interfaces_of_its_node(monkeypatch: pytest.MonkeyPatch) -> None:
    """Environment variables that are the same on all nodes are passed to replicas. Variables that name a network
    interface are not passed, since each node sets its own."""
    for name, value in (("GLOO_SOCKET_IFNAME", "eth0"), ("NCCL_SOCKET_IFNAME", "eth0"), ("HF_HUB_OFFLINE", "1")):
        monkeypatch.setenv(name, value)
    passed = environment(ReplicaSettings(ModelSpec("m", "sim://"), "test"), logical_gpus=False)
    assert passed["HF_HUB_OFFLINE"] == "1"
    assert not {"GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"} & passed.keys()
