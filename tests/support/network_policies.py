"""Reachability under a set of NetworkPolicies, as the Kubernetes documentation defines it: both ends must allow a
connection.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Peer:
    """An end of a connection: a pod or, with `address`, a peer outside the cluster."""

    namespace: str = ""
    labels: Mapping[str, str] = field(default_factory=dict)
    address: str = ""

    @property
    def namespace_labels(self) -> Mapping[str, str]:
        """Labels of the peer's namespace: only the label with its name, which every namespace has."""
        return {"kubernetes.io/metadata.name": self.namespace}


def selects(selector: Mapping[str, Any], labels: Mapping[str, str]) -> bool:
    """Return whether a label selector matches the labels."""
    if any(labels.get(key) != value for key, value in (selector.get("matchLabels") or {}).items()):
        return False
    for expression in selector.get("matchExpressions") or ():
        value, operator = labels.get(expression["key"]), expression["operator"]
        if operator == "In" and value not in expression["values"]:
            return False
        if operator == "NotIn" and value in expression["values"]:
            return False
        if operator == "Exists" and value is None:
            return False
        if operator not in ("In", "NotIn", "Exists"):
            raise NotImplementedError(operator)
    return True


class Network:
    """NetworkPolicies of one namespace."""

    def __init__(self, namespace: str, policies: Sequence[Mapping[str, Any]]) -> None:
        self._namespace = namespace
        self._policies = [policy["spec"] for policy in policies]

    def allows(self, source: Peer, target: Peer, port: int, protocol: str = "TCP") -> bool:
        """Return whether the policies allow a connection."""
        return self._one_way("egress", source, target, port, protocol) and self._one_way(
            "ingress", target, source, port, protocol
        )

    def _one_way(self, direction: str, pod: Peer, other: Peer, port: int, protocol: str) -> bool:
        if pod.address or pod.namespace != self._namespace:
            return True  # no policy of this namespace selects it
        word = direction.capitalize()
        mine = [
            policy
            for policy in self._policies
            if word in policy["policyTypes"] and selects(policy["podSelector"], pod.labels)
        ]
        if not mine:
            return True
        peers = "to" if direction == "egress" else "from"
        return any(
            self._port_fits(rule, port, protocol) and self._peer_fits(rule.get(peers), other)
            for policy in mine
            for rule in policy.get(direction) or ()
        )

    @staticmethod
    def _port_fits(rule: Mapping[str, Any], port: int, protocol: str) -> bool:
        ports = rule.get("ports")
        return not ports or any(entry["port"] == port and entry.get("protocol", "TCP") == protocol for entry in ports)

    def _peer_fits(self, peers: Sequence[Mapping[str, Any]] | None, other: Peer) -> bool:
        return not peers or any(self._one_peer_fits(peer, other) for peer in peers)

    def _one_peer_fits(self, peer: Mapping[str, Any], other: Peer) -> bool:
        if "ipBlock" in peer:
            # The API does not define whether addresses of pods count. Here they do not count, and tests use outside
            # peers.
            inside = ipaddress.ip_network(peer["ipBlock"]["cidr"])
            return bool(other.address) and ipaddress.ip_address(other.address) in inside
        if other.address:
            return False
        if "namespaceSelector" in peer:
            if not selects(peer["namespaceSelector"], other.namespace_labels):
                return False
        elif other.namespace != self._namespace:
            return False
        return selects(peer.get("podSelector") or {}, other.labels)
