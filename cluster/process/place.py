"""The pod and node on which this process runs. The Helm chart sets both names from the downward API."""

from __future__ import annotations

import os
import socket


def pod_name() -> str:
    """The name of the pod; empty outside Kubernetes."""
    return os.environ.get("POD_NAME", "")


def node_name() -> str:
    """Return the name of the Kubernetes node, or the host name outside Kubernetes."""
    return os.environ.get("NODE_NAME") or socket.gethostname()


def place_fields() -> dict[str, str]:
    """Return the fields of log lines that name this process's pod and node; empty outside Kubernetes."""
    return {"pod": pod_name(), "node": node_name()} if pod_name() else {}
