"""The pod and node on which this process runs. The Helm chart sets both names from the downward API."""

from __future__ import annotations

import os
import socket


def pod_name() -> str:
    """The name of the pod; empty outside Kubernetes."""
    return os.environ.get("POD_NAME", "")


def node_name() -> str:
    """The name of the Kubernetes node, or the host name outside Kubernetes."""
    return os.environ.get("NODE_NAME") or socket.gethostname()
