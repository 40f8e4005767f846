"""A gateway and several simulated workers. Each worker runs in its own process and behind a relay that can be cut.

Scenarios of faults use the fleet to kill, stop and cut workers, and to see when the gateway has noticed. Killed workers
restart automatically.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

from loadtests.children import Child, Children
from loadtests.serving import tenants
from loadtests.serving.ours import MODEL, READY_FILE, READY_S, authorization, configuration, exec_gateway
from tests.support.cuttable import Cuttable, Direction, cuttable

LOOK_S = 0.01
UP_S = 30.0
REDIAL_MAX_S = 0.3


@dataclass(frozen=True, slots=True)
class Event:
    """A line about a link in the gateway's log. `at`: wall-clock time."""

    at: float
    name: str
    worker: str
    reason: str


class LinkLog:
    """The link events in the gateway's log. The log is read while the gateway writes it."""

    def __init__(self, log: Path) -> None:
        self._log = log
        self._read = 0
        self.events: list[Event] = []
        self.up: set[str] = set()
        self._more = asyncio.Event()

    async def follow(self) -> None:
        """Follow the log until cancelled."""
        with self._log.open("rb") as lines:
            rest = b""
            while True:
                *whole, rest = (rest + lines.read()).split(b"\n")
                for line in whole:
                    self._handle_line(line)
                await asyncio.sleep(LOOK_S)

    def _handle_line(self, line: bytes) -> None:
        if b'"worker.' not in line:
            return
        entry = json.loads(line)
        at = datetime.fromisoformat(entry["timestamp"]).timestamp()
        event = Event(at, entry["event"], entry["worker"], entry.get("reason", ""))
        self.events.append(event)
        if event.name == "worker.connected":
            self.up.add(event.worker)
        elif event.name == "worker.disconnected":
            self.up.discard(event.worker)
        self._more.set()

    def wake_waiters(self) -> None:
        """Wake the callers of `until` when their condition has changed without a new log line."""
        self._more.set()

    async def until(self, holds: Callable[[], bool], timeout_s: float) -> bool:
        """Wait for events until `holds` is true; return False if that does not happen in time."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                while not holds():
                    self._more.clear()
                    await self._more.wait()
        return holds()

    async def downs(self, worker: str, since: float, timeout_s: float) -> Event | None:
        """Wait for the first loss of a worker's link after the wall-clock time `since`. Return the event, or None if
        there is no loss within `timeout_s`."""

        def first_down() -> Event | None:
            return next(
                (e for e in self.events if e.name == "worker.disconnected" and e.worker == worker and e.at >= since),
                None,
            )

        await self.until(lambda: first_down() is not None, timeout_s)
        return first_down()


@dataclass(eq=False, slots=True)
class SimWorker:
    """A simulated worker, across restarts of the worker's process."""

    id: str
    relay: Cuttable
    pid_file: Path
    cut: list[Direction] = field(default_factory=list)

    @property
    def pid(self) -> int:
        """Pid of the current process of the worker."""
        return int(self.pid_file.read_text())

    def signal(self, number: signal.Signals) -> int:
        """Send a signal to the current process of the worker; return the pid of the process."""
        pid = self.pid
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
        return pid

    def cut_direction(self, down: bool, *, beats: bool) -> None:
        """Block one direction: to the worker if `down` is true, else from the worker. With `beats`, block this
        direction on all connections. Otherwise block it only on the first connection, which carries the calls but not
        the heartbeats."""
        ways = [pair[down] for pair in self.relay.ways]
        self.cut = ways if beats else ways[:1]
        for way in self.cut:
            way.cut()

    def heal(self) -> None:
        """Unblock the directions that `cut_direction` has blocked."""
        for way in self.cut:
            way.heal()
        self.cut = []


@dataclass(eq=False, slots=True)
class Fleet:
    """A running fleet: one gateway and its simulated workers."""

    gateway: Child
    endpoints: Mapping[str, str]
    keys: Mapping[str, str]
    """API keys by priority class. The key "" is for the default class."""
    ledger: Path
    workers: list[SimWorker]
    link_log: LinkLog
    model: str = MODEL

    @property
    def grpc(self) -> str:
        """host:port of the gRPC API."""
        return self.endpoints["grpc"]

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        """gRPC metadata with the credentials of the default tenant."""
        return self.metadata_of("")

    def metadata_of(self, cls: str) -> tuple[tuple[str, str], ...]:
        """Return the gRPC metadata with the credentials of the tenant of a priority class."""
        return authorization(self.keys[cls])

    @property
    def gateway_pid(self) -> int:
        """Pid of the gateway itself, not of the guard process."""
        return next(process.pid for process in self.gateway.commands())

    def relay(self) -> AbstractAsyncContextManager[Cuttable]:
        """Return a relay between one worker and the gateway's link port."""
        return cuttable(self.endpoints["link"])

    async def is_up(self) -> bool:
        """Return whether every worker has a link."""
        return await self.until_all_up(LOOK_S)

    async def until_all_up(self, timeout_s: float = UP_S) -> bool:
        """Wait until every worker has a link; return whether that happened in time."""
        ids = {worker.id for worker in self.workers}
        return await self.link_log.until(lambda: self.link_log.up >= ids, timeout_s)


async def started_gateway(
    stack: AsyncExitStack,
    children: Children,
    home: Path,
    *,
    gateway: Mapping[str, object] | None = None,
    witness: tuple[str, ...] = (),
    classes: Sequence[str] = (),
) -> Fleet:
    """Start a gateway without workers and follow the gateway's log. Raises DidNotStart.

    `gateway`: more keys of the configuration's section `gateway`. `witness`: options for measurements in the
    gateway's process; if empty, nothing is measured. `classes`: priority classes. There is one tenant of the
    default class, and one for each of `classes`.
    """
    keys = await tenants.make_keys(home / "tenants", ("", *classes))
    text = configuration(MODEL, home / "tenants", log_level="info", more=gateway)
    child = exec_gateway(children, home, "gateway", text, witness)
    ready = home / "gateway" / READY_FILE

    async def there() -> bool:
        return ready.exists()

    stack.push_async_callback(child.stop)
    await child.until(there, "it serves", READY_S)
    link_log = LinkLog(child.log)
    following = asyncio.create_task(link_log.follow())
    stack.callback(following.cancel)
    return Fleet(child, json.loads(ready.read_text())["endpoints"], keys, home / "tenants" / "ledger.db", [], link_log)


@asynccontextmanager
async def running(
    children: Children,
    folder: Path,
    *,
    bundle: Path,
    sources: Sequence[str],
    name: str = "fleet",
    gateway: Mapping[str, object] | None = None,
    witness: tuple[str, ...] = (),
    classes: Sequence[str] = (),
) -> AsyncIterator[Fleet]:
    """Run a gateway and one simulated worker for each model source in `sources`. `gateway`: more keys of the
    configuration's section `gateway`. `witness`: options of loadtests/serving/gateway.py, which measures the gateway
    from within its process; without options, the gateway is not measured. `classes`: priority classes, each of which
    gets a tenant of its own. All processes end with the context. Raises DidNotStart."""
    home = folder / name
    async with AsyncExitStack() as stack:
        fleet = await started_gateway(stack, children, home, gateway=gateway, witness=witness, classes=classes)
        shared = ["--name", MODEL, "--bundle", str(bundle), "--redial-max-s", str(REDIAL_MAX_S)]
        lines = []
        for i, source in enumerate(sources):
            worker = SimWorker(f"w{i}", await stack.enter_async_context(fleet.relay()), home / f"{i}.pid")
            fleet.workers.append(worker)
            own = ["--id", worker.id, "--link", worker.relay.address, "--source", source]
            lines.append([*shared, *own, "--ready", str(home / f"{i}.ready")])
        (home / "workers.json").write_text(json.dumps(lines))
        command = [sys.executable, "-m", "loadtests.serving.brood", "--folder", str(home)]
        command += ["--workers", str(home / "workers.json")]
        brood = children.start(f"{name}-workers", "worker replica", command)
        stack.push_async_callback(brood.stop)
        await brood.until(fleet.is_up, "every worker has its link", UP_S)
        yield fleet
