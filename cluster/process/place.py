"""Where this process runs, by the names that Kubernetes gives: the chart sets them from the downward API."""

from __future__ import annotations

import os
import socket


def pod_name() -> str:
    """The pod's; empty outside Kubernetes."""
    return os.environ.get("POD_NAME", "")


def node_name() -> str:
    """The Kubernetes node's; outside Kubernetes the host's name."""
    return os.environ.get("NODE_NAME") or socket.gethostname()
