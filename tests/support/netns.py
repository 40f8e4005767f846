"""Network namespaces that are joined by a bridge and act as several hosts. Creating them needs root."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

RESOLVERS = Path("/etc/netns")
"""Folder of files for network namespaces. Under `ip netns exec`, the files in a namespace's folder here replace those
of /etc.
"""


@dataclass(frozen=True)
class Host:
    """A network namespace with one interface, `eth0`, on the bridge that joins the hosts."""

    namespace: str
    address: str

    def command(self, *arguments: str) -> list[str]:
        """Return the command line that runs `arguments` on this host."""
        return ["ip", "netns", "exec", self.namespace, *arguments]

    @property
    def inode(self) -> int:
        """Inode of the host's network namespace. For a process on the host, /proc/<pid>/ns/net has the same inode."""
        return os.stat(f"/run/netns/{self.namespace}").st_ino

    def holds(self, pid: int) -> bool:
        """Return whether a process runs on this host."""
        return os.stat(f"/proc/{pid}/ns/net").st_ino == self.inode


@dataclass(frozen=True)
class Network:
    """The hosts of a network. `address`: the address at which the hosts reach programs in this machine's own network
    namespace."""

    hosts: tuple[Host, ...]
    address: str


def _ip(*arguments: str) -> None:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"ip {' '.join(arguments)}: {done.stderr.strip()}")


def _without_names(host: Host, unreachable: str, undo: contextlib.ExitStack) -> None:
    """Make name lookups on a host fail at once.

    The host cannot reach this machine's resolver, and each lookup would wait for 10 s. PyTorch's ranks look up the
    names of their peers when they connect.
    """
    folder = RESOLVERS / host.namespace
    undo.callback(_forget, folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "resolv.conf").write_text(f"nameserver {unreachable}\n")


def _forget(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    with contextlib.suppress(OSError):  # other files are there
        RESOLVERS.rmdir()


@contextlib.contextmanager
def network(count: int) -> Iterator[Network]:
    """Create `count` hosts on a bridge of their own. Names and the /24 are derived from the id of this process."""
    number = os.getpid() % 200 + 20
    prefix, bridge = f"10.199.{number}", f"hrb{number}"
    hosts = tuple(Host(f"hr{number}-{i}", f"{prefix}.{i}") for i in range(1, count + 1))
    with contextlib.ExitStack() as undo:
        _ip("link", "add", bridge, "type", "bridge")
        undo.callback(_ip, "link", "del", bridge)
        _ip("addr", "add", f"{prefix}.254/24", "dev", bridge)
        _ip("link", "set", bridge, "up")
        for i, host in enumerate(hosts):
            _ip("netns", "add", host.namespace)
            undo.callback(_ip, "netns", "del", host.namespace)
            _without_names(host, f"{prefix}.254", undo)
            _ip("link", "add", f"{bridge}v{i}", "type", "veth", "peer", "name", "eth0", "netns", host.namespace)
            undo.callback(_ip, "link", "del", f"{bridge}v{i}")  # else the kernel delays the removal of the link
            _ip("link", "set", f"{bridge}v{i}", "master", bridge, "up")
            _ip("-n", host.namespace, "addr", "add", f"{host.address}/24", "dev", "eth0")
            _ip("-n", host.namespace, "link", "set", "eth0", "up")
            _ip("-n", host.namespace, "link", "set", "lo", "up")
            # Programs find their own address by looking up the route to a distant address.
            _ip("-n", host.namespace, "route", "add", "default", "via", f"{prefix}.254")
        yield Network(hosts, f"{prefix}.254")
