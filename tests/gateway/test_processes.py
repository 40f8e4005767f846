"""Two gateway processes on one port. Both serve, each has its own metrics, and either serves alone if the other is
gone."""

from __future__ import annotations

import asyncio
import os
import signal
from collections import Counter
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest

from cluster.cli.local import gateway_metrics
from cluster.cli.local.run_folder import ProcessId, RunFolder
from cluster.v1 import inference_pb2_grpc as pb_grpc
from cluster.wire.bundle import Bundle
from loadtests.children import Children
from loadtests.serving import ours as serving
from loadtests.serving import tenants
from tests.support.calls import chat
from tests.support.cluster import until
from tests.support.shell import headrace

pytestmark = pytest.mark.slow

OWN_CONNECTION = (("grpc.use_local_subchannel_pool", 1),)
CONNECTIONS, TOKENS = 16, 8


@pytest.fixture
async def ours(tmp_path: Path, checkpoint: Path, bundle: Bundle) -> AsyncIterator[serving.Ours]:
    """Provide two gateway processes, and a worker process whose configuration names only the first gateway process."""
    bundle.save(tmp_path / "bundle")
    async with Children(tmp_path / "logs", term_s=2.0) as children:
        yield await serving.start(
            children, tmp_path, bundle=tmp_path / "bundle", source=f"sim://{checkpoint}?decode_ms=2", processes=2
        )


def configuration_of(folder: Path) -> str:
    """Write the first process's configuration to a file, as `up` does in the run folder, and return the path."""
    (file,) = folder.glob("*-gateway/cluster.yaml")
    return file.read_text()


async def ask(ours: serving.Ours, connections: int) -> list[Any]:
    """Make two unary calls over each of `connections` connections. Returns the answers."""
    channels = [grpc.aio.insecure_channel(ours.grpc, options=OWN_CONNECTION) for _ in range(connections)]
    try:
        stubs = [pb_grpc.InferenceStub(channel) for channel in channels]
        request = chat(model=serving.MODEL, max_tokens=TOKENS, ignore_eos=True)
        calls = [stub.Chat(request, timeout=60, metadata=ours.metadata) for stub in stubs for _ in range(2)]
        return await asyncio.gather(*calls)
    finally:
        for channel in channels:
            await channel.close()


def answered(endpoints: Mapping[str, str]) -> int:
    """Return the number of answered calls in the metrics of a process."""
    found = gateway_metrics.scrape(endpoints["metrics"])
    assert found is not None
    return int(sum(value for name, _, value in found if name == "headrace_requests_total"))


def own_process(child: Any) -> int:
    """Return the pid of the gateway itself. The pid of the gateway's guard process is a different one."""
    (process,) = child.commands()
    return int(process.pid)


def sockets(child: Any, address: str) -> Counter[str]:
    """Return the sockets of a process at an address, by state."""
    port = int(address.rsplit(":", 1)[1])
    found = psutil.Process(own_process(child)).net_connections("tcp")
    return Counter(one.status for one in found if one.laddr and one.laddr.port == port)


async def test_both_serve_and_one_goes_on_alone(
    ours: serving.Ours, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two gateway processes share one port. Both get connections, their metrics add up to all calls, and `status` shows
    both. After one process is killed, the other serves the port alone."""
    ((second, at_second),) = ours.siblings
    assert at_second["grpc"] == ours.grpc
    assert int(at_second["link"].rsplit(":", 1)[1]) == int(ours.endpoints["link"].rsplit(":", 1)[1]) + 9
    assert "admin" not in at_second
    both = (ours.gateway, second)
    assert [sockets(one, ours.grpc)["LISTEN"] for one in both] == [1, 1], "every ready process is reached"
    before = [answered(ours.endpoints), answered(at_second)]
    answers = await ask(ours, CONNECTIONS)
    assert [answer.usage.completion_tokens for answer in answers] == [TOKENS] * 2 * CONNECTIONS
    counts = [answered(e) - b for e, b in zip((ours.endpoints, at_second), before, strict=True)]
    assert sum(counts) == 2 * CONNECTIONS
    listening = [sockets(one, ours.grpc) for one in both]
    assert all(counts), f"{counts}, a chance of 1 in 32768; sockets of both: {listening}"

    monkeypatch.setenv("HEADRACE_CACHE_DIR", str(tmp_path / "cache"))
    own, run = ProcessId.of(os.getpid()), RunFolder("here")
    run.path.mkdir(parents=True)
    supervisor = {"pid": own.pid, "created": own.created}
    run.config_file.write_text(configuration_of(tmp_path))
    run.write({"supervisor": supervisor, "endpoints": dict(ours.endpoints), "siblings": [dict(at_second)]})
    status = (await asyncio.to_thread(headrace, "status")).stdout
    assert [line.split()[:3] for line in status.splitlines() if at_second["link"] in line] == [["1", "UP", "1"]]

    os.kill(own_process(second), signal.SIGKILL)
    await until(lambda: not second.alive, "the second is gone")
    assert len(await ask(ours, CONNECTIONS)) == 2 * CONNECTIONS
    rows = gateway_metrics.gateway_rows([ours.endpoints, at_second])
    assert [(row["up"], row["workers"]) for row in rows] == [(True, 1), (False, 0)]


async def test_the_second_lives_without_the_first(ours: serving.Ours) -> None:
    """A worker learns the second gateway's address from the first gateway, and keeps it after the first gateway is
    killed."""
    ((_, at_second),) = ours.siblings
    os.kill(own_process(ours.gateway), signal.SIGKILL)
    await until(lambda: not ours.gateway.alive, "the first is gone")
    assert len(await ask(ours, 4)) == 8
    assert answered(at_second) >= 8


@pytest.mark.parametrize(
    ("processes", "arguments", "code", "message"),
    [
        (1, ["--process", "1"], 2, "--process 1: gateway.processes is 1, and they count from 0"),
        (2, [], 1, "gateway.listen.grpc: port 0 with processes: 2: each process would pick another"),
    ],
)
async def test_what_cannot_be_shared_is_told(
    tmp_path: Path, processes: int, arguments: list[str], code: int, message: str
) -> None:
    """A process number that is not configured is refused. Ports of 0 are refused with several processes, since other
    processes could not know the chosen port."""
    await tenants.make_key(tmp_path)
    file = tmp_path / "cluster.yaml"
    file.write_text(serving.configuration("m", tmp_path).replace("processes: 1", f"processes: {processes}"))
    done = await asyncio.to_thread(
        headrace, "gateway", "-f", str(file), "--folder", str(tmp_path / "state"), *arguments
    )
    assert done.returncode == code
    assert message in " ".join(done.stderr.split())
