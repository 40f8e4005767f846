"""Draining of a Ray node: how replicas learn the drain deadline, and how the pod's preStop hook starts the drain.

After SIGTERM, `ray start --block` marks the node as draining and waits until the drain deadline, which is
RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S seconds later. Ray Serve stops a replica on a draining node only
graceful_shutdown_timeout_s before the deadline, and the replica would accept new work until then. So replicas poll Ray
themselves and begin to drain at once, with nearly all the remaining time (drain_time.py). A cloud's notice that a spot
node will be reclaimed reaches the replicas in the same way, with a nearer deadline.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Awaitable, Callable, Collection

import structlog
from ray._private import services
from ray._raylet import GcsClient  # type: ignore[attr-defined]  # a compiled module
from ray.core.generated import autoscaler_pb2

from cluster.ray.drain_time import usable_s

log = structlog.get_logger("replica")

POLL_S = 1.0
LAST_POLL_S = 2.0
_RPC_S = 2.0
_NODE_POLL_S = 0.2


class Nodes:
    """The Ray nodes on which the processes of one replica run. Its methods query Ray's head node, which may be
    unreachable."""

    def __init__(self, node_ids: Collection[str], gcs_address: str) -> None:
        self._ids = frozenset(node_ids)
        self._address = gcs_address
        self._client: GcsClient | None = None

    def left_s(self) -> float | None:
        """Return the seconds until the nearest drain deadline of the nodes; None if no node has a deadline. Blocks."""
        client = self._client or GcsClient(address=self._address)
        self._client = None  # not reused if the query fails
        draining = client.get_draining_nodes(timeout=_RPC_S)
        self._client = client
        deadlines_ms = [deadline for node, deadline in draining.items() if node in self._ids and deadline]
        return max(min(deadlines_ms) / 1000 - time.time(), 0.0) if deadlines_ms else None


async def poll_left_s(nodes: Nodes, within_s: float | None = None) -> float | None:
    """Return the seconds until the nearest drain deadline of the nodes; None if there is no deadline or Ray does
    not answer.

    `within_s`: how long to wait for Ray's answer, in seconds; None: no limit.
    """
    try:
        async with asyncio.timeout(within_s):
            return await asyncio.to_thread(nodes.left_s)
    except Exception as error:  # from Ray's RPC; the next poll may succeed
        log.debug("ray.nodes_not_read", error=str(error))
        return None


async def watch(nodes: Nodes, leave: Callable[[float], Awaitable[None]]) -> None:
    """Poll until a node begins to drain, then call `leave` once with the number of seconds during which calls may still
    end or resume elsewhere."""
    while (left_s := await poll_left_s(nodes)) is None:  # noqa: ASYNC110 - Ray has no notification for it
        await asyncio.sleep(POLL_S)
    await leave(usable_s(left_s))


class NoRayNode(RuntimeError):
    """Error: this host has no Ray node, or more than one Ray node."""


def drain_here(timeout_s: float) -> bool:
    """Mark the only Ray node that is visible to this process as draining, and wait until that node has ended.

    Returns False if the node still runs after `timeout_s` seconds. Raises NoRayNode, ConnectionError and RuntimeError.
    """
    nodes = services.find_node_ids()
    if len(nodes) != 1:
        raise NoRayNode(f"this process can see {len(nodes)} Ray nodes; expected exactly one")
    (node,) = nodes
    deadline = time.monotonic() + timeout_s
    client = GcsClient(address=_head_address())
    accepted, why = client.drain_node(
        node,
        autoscaler_pb2.DrainNodeReason.DRAIN_NODE_REASON_PREEMPTION,
        "the pod is about to end",
        int((time.time() + timeout_s) * 1000),
        timeout=_RPC_S * 5,
    )
    if not accepted:
        raise RuntimeError(f"Ray refuses to drain node {node}: {why}")
    while node in services.find_node_ids():
        if time.monotonic() > deadline:
            return False
        time.sleep(_NODE_POLL_S)
    return True


def _head_address() -> str:
    """Return RAY_ADDRESS, which KubeRay sets, or else the head address of the Ray on this host."""
    return os.environ.get("RAY_ADDRESS") or services.canonicalize_bootstrap_address_or_die("auto")
