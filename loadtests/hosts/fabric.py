"""Hosts and pods as network namespaces: one bridge per host, a switch between the hosts, and no route out.

All bridges are in one separate namespace. A single cable leads from there to this machine's own network; the harness
probes pods over it, as a kubelet does. The default route of a pod leads to the switch, which forwards nothing. So a
program that looks up its own address finds the pod's address, and no packet leaves the network.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

PREFIX = "hrh"
"""Prefix of the name of every namespace and interface. The process id follows the prefix."""
NETWORK = "10.201.{}.{}"
SWITCH, KUBELET, FIRST = 1, 254, 10


@dataclass(frozen=True, slots=True)
class Place:
    """Network namespace of a pod, with the pod's host and IP address."""

    namespace: str
    host: str
    address: str

    def command(self, *arguments: str) -> list[str]:
        """Return the command line that runs `arguments` in the namespace."""
        return ["ip", "netns", "exec", self.namespace, *arguments]


def ip(*arguments: str) -> None:
    """Run the command `ip`. Raises RuntimeError with the output of the command."""
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"ip {' '.join(arguments)}: {done.stderr.strip()}")


@dataclass(eq=False, slots=True)
class Fabric:
    """The running network. Pods get addresses in order."""

    core: str
    number: int
    tag: str
    hosts: Sequence[str]
    places: list[Place] = field(default_factory=list)

    @property
    def kubelet(self) -> str:
        """Address of the test harness, which acts as the kubelet."""
        return NETWORK.format(self.number, KUBELET)

    def place(self, name: str, host: str) -> Place:
        """Create the namespace of a pod on a host and return its place."""
        index = len(self.places)
        namespace, port = f"{self.tag}-{name}", f"v{index}"
        place = Place(namespace, host, NETWORK.format(self.number, FIRST + index))
        ip("netns", "add", namespace)
        self.places.append(place)
        ip("-n", self.core, "link", "add", port, "type", "veth", "peer", "name", "eth0", "netns", namespace)
        ip("-n", self.core, "link", "set", port, "master", f"br-{host}", "up")
        ip("-n", namespace, "addr", "add", f"{place.address}/24", "dev", "eth0")
        ip("-n", namespace, "link", "set", "eth0", "up")
        ip("-n", namespace, "link", "set", "lo", "up")
        ip("-n", namespace, "route", "add", "default", "via", NETWORK.format(self.number, SWITCH))
        low_ports = place.command("sysctl", "-q", "-w", "net.ipv4.ip_unprivileged_port_start=0")  # as in every pod
        subprocess.run(low_ports, check=True, capture_output=True)
        return place

    def cut(self, host: str) -> None:
        """Unplug a host from the switch. Pods on the host still reach one another."""
        ip("-n", self.core, "link", "set", f"up-{host}", "down")

    def heal(self, host: str) -> None:
        """Plug a host into the switch again."""
        ip("-n", self.core, "link", "set", f"up-{host}", "up")

    def reachable_outside(self) -> Mapping[str, str]:
        """Return, for each network namespace, the destinations outside the test network that it reached. The result is
        empty if the network is isolated."""
        script = (
            "import socket\n"
            "for address in ('1.1.1.1', '8.8.8.8', '192.0.2.1'):\n"
            "    with socket.socket() as probe:\n"
            "        probe.settimeout(0.3)\n"
            "        if not probe.connect_ex((address, 443)):\n"
            "            print(address)\n"
        )
        reached = {}
        for place in self.places:
            done = subprocess.run(
                place.command("python3", "-c", script), capture_output=True, text=True, check=False, timeout=30
            )
            if done.returncode or done.stdout.strip():
                reached[place.namespace] = done.stdout.strip() or done.stderr.strip()[-200:]
        return reached


@contextlib.contextmanager
def fabric(hosts: Sequence[str]) -> Iterator[Fabric]:
    """Create the network of `hosts`, and remove it when the context ends. Needs root."""
    sweep()
    number, tag = os.getpid() % 250 + 1, f"{PREFIX}{os.getpid()}"
    core, leg = f"{tag}-core", f"{tag}k"[:15]
    made = Fabric(core, number, tag, tuple(hosts))
    try:
        ip("netns", "add", core)
        for bridge in ("core", *hosts):
            ip("-n", core, "link", "add", f"br-{bridge}", "type", "bridge")
            ip("-n", core, "link", "set", f"br-{bridge}", "up")
        for host in hosts:
            ip("-n", core, "link", "add", f"up-{host}", "type", "veth", "peer", "name", f"dn-{host}")
            ip("-n", core, "link", "set", f"up-{host}", "master", "br-core", "up")
            ip("-n", core, "link", "set", f"dn-{host}", "master", f"br-{host}", "up")
        ip("-n", core, "addr", "add", f"{NETWORK.format(number, SWITCH)}/24", "dev", "br-core")
        ip("-n", core, "link", "add", "kubelet", "type", "veth", "peer", "name", leg, "netns", str(os.getpid()))
        ip("-n", core, "link", "set", "kubelet", "master", "br-core", "up")
        ip("addr", "add", f"{made.kubelet}/24", "dev", leg)
        ip("link", "set", leg, "up")
        yield made
    finally:
        with contextlib.suppress(RuntimeError):
            ip("link", "del", leg)  # at once; the kernel delays a removal with the namespace
        for namespace in (core, *(place.namespace for place in made.places)):  # removes the ends of cables too
            with contextlib.suppress(RuntimeError):
                ip("netns", "del", namespace)


def sweep() -> None:
    """Remove the remains of killed runs: namespaces whose creating process is gone."""
    for path in Path("/run/netns").glob(f"{PREFIX}[0-9]*-*"):
        maker = path.name.removeprefix(PREFIX).split("-")[0]
        if maker.isdigit() and not Path(f"/proc/{maker}").exists():
            with contextlib.suppress(RuntimeError):
                ip("netns", "del", path.name)
