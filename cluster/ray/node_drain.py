"""A Ray node that is about to end: when, as its replicas see it, and how its pod's preStop hook asks for it.

SIGTERM to `ray start --block` marks the node as draining, with a deadline of RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S from
then, and waits so long. Ray Serve stops a replica there only when the deadline minus the deployment's
graceful_shutdown_timeout_s has passed, and until then it goes on taking work. Replicas therefore look themselves, and
begin to drain at once with nearly all the time that is left (drain_time.py). A cloud's notice of a spot node that is
taken away comes the same way, with a nearer deadline.
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

LOOK_S = 1.0
LAST_LOOK_S = 2.0
_RPC_S = 2.0
_POLL_S = 0.2


class Nodes:
    """The Ray nodes on which one replica's processes run. Asks Ray's head, which may be away."""

    def __init__(self, node_ids: Collection[str], gcs_address: str) -> None:
        self._ids = frozenset(node_ids)
        self._address = gcs_address
        self._client: GcsClient | None = None

    def left_s(self) -> float | None:
        """Seconds until the first deadline; None while none of them drains with a deadline. Blocking."""
        client = self._client or GcsClient(address=self._address)
        self._client = None  # a client that has failed is not used again
        draining = client.get_draining_nodes(timeout=_RPC_S)
        self._client = client
        deadlines_ms = [deadline for node, deadline in draining.items() if node in self._ids and deadline]
        return max(min(deadlines_ms) / 1000 - time.time(), 0.0) if deadlines_ms else None


async def look(nodes: Nodes, within_s: float | None = None) -> float | None:
    """What Nodes.left_s returns; None where the head does not answer (`within_s`)."""
    try:
        async with asyncio.timeout(within_s):
            return await asyncio.to_thread(nodes.left_s)
    except Exception as error:  # of Ray's RPC: the next look may get an answer
        log.debug("nodes.unknown", error=str(error))
        return None


async def watch(nodes: Nodes, leave: Callable[[float], Awaitable[None]]) -> None:
    """Call `leave` once with the time that calls have, when a node begins to drain."""
    while (left_s := await look(nodes)) is None:  # noqa: ASYNC110 - Ray tells nobody of it
        await asyncio.sleep(LOOK_S)
    await leave(usable_s(left_s))


class NoRayNode(RuntimeError):
    """No Ray node runs here."""


def drain_here(timeout_s: float) -> bool:
    """Mark the only Ray node that this process sees as draining, and wait until it has ended; False when it still runs
    after `timeout_s`. Raises NoRayNode, ConnectionError and RuntimeError."""
    nodes = services.find_node_ids()
    if len(nodes) != 1:
        raise NoRayNode(f"{len(nodes)} Ray nodes run where this process can see them; one is expected")
    (node,) = nodes
    until = time.monotonic() + timeout_s
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
        if time.monotonic() > until:
            return False
        time.sleep(_POLL_S)
    return True


def _head_address() -> str:
    """RAY_ADDRESS as KubeRay sets it, or the head of the Ray that runs here."""
    return os.environ.get("RAY_ADDRESS") or services.canonicalize_bootstrap_address_or_die("auto")
