"""The check of the header Host without `auth`, which keeps pages of other sites (DNS rebinding) out of all ports."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from cluster.config.document import parse
from cluster.gateway.apis.http.body import Refused
from cluster.gateway.apis.http.host_names import MAX_KNOWN, HostNames
from tests.gateway.apis.http.raw import read_all
from tests.support.cluster import LOOPBACK, TestCluster, running_cluster
from tests.support.http import Wire, completion_body, fetch
from tests.support.keyed import keyed_cluster

EVIL = "evil.example:8000"
ALLOWED = [
    *("127.0.0.1", "127.0.0.1:8000", "192.168.1.7:8000", "[::1]", "[::1]:8000", "[fe80::1]", "[::ffff:127.0.0.1]:1"),
    *("localhost", "LocalHost:8000", "localhost.", "a.localhost", "", "laptop:8000", "headrace", "my_host-1"),
    *("gateway.default.svc", "gateway.default.svc.cluster.local:8000", "host.docker.internal", socket.gethostname()),
    *("llm.example", "LLM.example.:8000"),
]
REFUSED = [
    *(EVIL, "evil.example", "evil.local", "localhost.evil.example", "127.0.0.1.evil.example", "[::1].evil.example"),
    *("127.0.0.1:80.evil.example", "[::1]:80.evil.example", "[::1]evil.example", "[evil.example]", "[127.0.0.1]"),
    *("::1", "[::1", "a@evil.example", "127.0.0.1:80@evil.example", "127.0.0.1/.evil.example", "svc.evil.example"),
    *("x.llm.example", ".", "127.0.0.1..", "1.2.3.4.5", "256.1.1.1", "evil,localhost", "evil.example\xe4"),
]


@pytest.mark.parametrize("host", ALLOWED)
def test_names_that_nobody_can_register_are_answered(host: str) -> None:
    """Addresses, names of this host, of services and without a dot, and configured names are answered with any port."""
    names = HostNames(["llm.example"])
    for _ in range(2):
        names.check([(b"accept", b"*/*"), (b"host", host.encode())])
    names.check([])


@pytest.mark.parametrize("host", REFUSED)
def test_other_names_are_refused(host: str) -> None:
    """A name that another site can have is refused, whatever address it contains. The error has the remedy."""
    names = HostNames(["llm.example", ""])
    for _ in range(2):
        with pytest.raises(Refused, match=r"gateway\.host_names") as caught:
            names.check([(b"host", host.encode("latin-1"))])
    assert caught.value.status == 421


def test_known_names_are_bounded() -> None:
    """The memory for names that were answered is bounded."""
    names = HostNames([])
    for number in range(2 * MAX_KNOWN):
        names.check([(b"host", b"h%d" % number)])
    assert len(names._known) == MAX_KNOWN


async def metrics(cluster: TestCluster, host: str) -> bytes:
    """Return the answer of the metrics port to a request for a host."""
    wire = await Wire.open(cluster, port="metrics")
    wire.ask("/metrics", host=host, connection="close")
    answer = await read_all(wire.reader)
    await wire.close()
    return answer


async def test_without_auth_no_port_answers_another_site(cluster: TestCluster) -> None:
    """Without `auth` a request for a rebinding name is refused by all APIs, for unknown paths, by the page and by the
    metrics, also if the target holds the name. Only the health of the process is told."""
    for path in ("/v1/completions", "/v1/chat/completions", "/v1/embeddings", "/v1/messages", "/v1/none", "/score"):
        reply = await fetch(cluster, path, completion_body(), host=EVIL)
        assert (reply.status, reply.error["code"]) == (421, "misdirected")
    for path in ("/v1/models", "/", "/none", "/console/session", "http://evil.example/v1/models"):
        host = "127.0.0.1" if path.startswith("http") else EVIL
        assert (await fetch(cluster, path, host=host)).status == 421
    assert (await fetch(cluster, "/health", host=EVIL)).status == 200
    assert (await metrics(cluster, EVIL)).startswith(b"HTTP/1.1 421 ")
    for host in ("test", "localhost:8000"):
        assert (await fetch(cluster, "/v1/models", host=host)).status == 200
        assert (await metrics(cluster, host)).startswith(b"HTTP/1.1 200 ")


async def test_configured_names_are_answered_everywhere(tmp_path: Path) -> None:
    """The names in `gateway.host_names` and the host of the console's URL are answered by the API and the metrics."""
    gateway = "gateway:\n  host_names: [laptop.example]\n  console: {public_url: 'https://llm.example.com:8443'}\n"
    async with running_cluster(tmp_path, LOOPBACK.replace("gateway:\n", gateway)) as cluster:
        for host, status in (("laptop.example:8000", 200), ("llm.example.com", 200), ("other.example", 421)):
            assert (await fetch(cluster, "/v1/models", host=host)).status == status
            assert (await metrics(cluster, host)).startswith(b"HTTP/1.1 %d " % status)


async def test_with_auth_any_name_is_answered(tmp_path: Path) -> None:
    """With `auth` a gateway answers at any name, since no other site has a key."""
    async with keyed_cluster(tmp_path) as keyed:
        assert (await fetch(keyed.cluster, "/v1/models", host=EVIL)).status == 401
        assert (await metrics(keyed.cluster, EVIL)).startswith(b"HTTP/1.1 200 ")


@pytest.mark.parametrize("name", ["Laptop", "a b", "http://a", "a:80", "*", "-a", "a.", ""])
def test_host_names_are_checked(name: str) -> None:
    """A configured host name has no port, scheme or pattern, and is in lower case, as it is compared."""
    with pytest.raises(ValueError, match="host_names"):
        parse(LOOPBACK.replace("gateway:\n", f"gateway:\n  host_names: ['{name}']\n"))
