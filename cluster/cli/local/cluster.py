"""A local cluster: start Ray, gateway processes and a controller, restart processes that die, and end all processes.

Every process of a cluster has the cluster's instance id in the environment variable HEADRACE_INSTANCE. Stopping the
cluster ends all processes with the cluster's instance id. So no process is left over, and another Ray, vLLM or Headrace
on the machine is never touched.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import sys
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import yaml

from cluster.admin.v1 import admin_pb2
from cluster.cli.access import local_access
from cluster.cli.base import replace_file
from cluster.cli.commands.processes import part_name
from cluster.cli.commands.status import Admin
from cluster.cli.local.children import Child, keep_alive
from cluster.cli.local.run_folder import ProcessId, RunFolder
from cluster.cli.local.step_lines import StepLine, duration
from cluster.config.schema import Config
from cluster.ray import reaper
from cluster.ray.local_cluster import LocalRay, LocalRaySettings, RayDidNotStart

GATEWAY_START_S = 30.0
DRAIN_S = 2.0
"""Time that running streams have to finish when a local cluster stops, in seconds."""
CONTROLLER_GRACE_S = 8.0
POLL_S = 0.1
RAY_WATCH_S = 0.5
MODELS_WATCH_S = 1.0
PASSING = re.compile(r"|waiting for Ray to place it|\d+ of \d+ replicas serve|being replaced")
"""Pattern of state reasons that are not reported, because they resolve without an action of the user."""


class StartFailed(Exception):
    """Error: the cluster did not start. The message names the part, the reason and the log."""


class LocalCluster:
    """A run of a local cluster. Call `start` first, then `supervise`, and `stop` at the end."""

    def __init__(self, config: Config, run: RunFolder, report: Callable[[str], None]) -> None:
        """Prepare the parts of a cluster. `report` prints messages for the user.

        Every port in `config` must be chosen already (see ports.choose_ports).
        """
        self.config = config
        self.run = run
        self.instance = uuid.uuid4().hex[:12]  # short, because the id is part of a unix socket's path
        self._report = report
        self._ray: LocalRay | None = None if config.ray else self._new_ray()
        self._ray_up = asyncio.Event()
        self._gateways = [self._new_gateway(process) for process in range(config.gateway.processes)]
        self._controller = Child("controller", [], self._environment(), run.log_file("controller"))
        self._endpoints: dict[int, dict[str, str]] = {}

    def __repr__(self) -> str:
        return f"LocalCluster({self.config.name}, {self.instance})"

    @property
    def endpoints(self) -> dict[str, str]:
        """Addresses (host:port) of the first gateway process by listener name; empty before that process is up."""
        return dict(self._endpoints.get(0, {}))

    # ---- start

    async def start(self, step: StepLine) -> None:
        """Start Ray, the gateways and the controller. Raises StartFailed."""
        replace_file(self.run.config_file, self.config_text())
        self.write_state("starting")
        for part in (*(gateway.name for gateway in self._gateways), "controller"):
            self.run.log_file(part).write_bytes(b"")
        self._link_ray_logs()
        step.show("starting ray and the gateway")
        ray = asyncio.ensure_future(self._start_ray())
        try:
            await self._start_gateways()
            step.show(f"gateway up in {duration(step.elapsed_s)}, ray starting")
            await asyncio.shield(ray)
        except BaseException:  # including Ctrl-C: a Ray that is still starting must not outlive this process
            await self._stop_starting_ray(ray)
            raise
        await self._start_controller()
        self.write_state("starting")

    async def wait_for_models(self, step: StepLine) -> list[admin_pb2.CatalogEntry]:
        """Wait until each model is READY or FAILED in the gateway's catalog. Returns the catalog's entries.

        Raises StartFailed if no model is READY.
        """
        wanted = {model.name for model in self.config.models}
        admin = Admin(local_access(self.endpoints["admin"], self.config))
        try:
            while True:
                entries = await self._catalog(admin)
                settled = {e.name for e in entries if e.state in ("READY", "FAILED")}
                if wanted <= settled:
                    break
                step.show("   ".join(f"{e.name} {e.state.lower()}" for e in entries) or "waiting for the controller")
                await asyncio.sleep(POLL_S)
        finally:
            admin.close()
        if wanted and not any(entry.state == "READY" for entry in entries):
            reasons = "\n".join(f"  {e.name}: {e.state_reason or 'no reason given'}" for e in entries)
            raise StartFailed(f"no model became READY:\n{reasons}\n  logs: {self.run.path}, {self.ray_logs}")
        return entries

    def _link_ray_logs(self) -> None:
        """Create a symbolic link `ray-session` in the run folder. The link points to Ray's session folder.

        The session folder of the previous run is deleted.
        """
        link = self.run.path / "ray-session"
        if link.is_symlink():
            previous = link.readlink()
            if previous.name.startswith("headrace-") or previous.parent == self.run.path:
                shutil.rmtree(previous, ignore_errors=True)
            link.unlink()
        if self._ray is not None:
            link.symlink_to(self._ray.folder)

    @property
    def ray_logs(self) -> str:
        """The location of the replicas' logs, as a text for messages."""
        return str(self._ray.folder) if self._ray is not None else "on the Ray cluster"

    async def _catalog(self, admin: Admin) -> list[admin_pb2.CatalogEntry]:
        try:
            entries, _ = await asyncio.to_thread(admin.catalog)
        except grpc.RpcError:  # the gateway is restarting
            return []
        return entries

    async def _start_gateways(self) -> None:
        starts = (self._start_gateway(process) for process in range(len(self._gateways)))
        failures = [done for done in await asyncio.gather(*starts, return_exceptions=True) if done is not None]
        if failures:
            raise failures[0]

    async def _start_gateway(self, process: int) -> None:
        gateway, ready_file = self._gateways[process], self._ready_file(process)
        ready_file.unlink(missing_ok=True)
        await gateway.start()
        deadline = time.monotonic() + GATEWAY_START_S
        while time.monotonic() < deadline:
            if gateway.pid is None:
                raise StartFailed(f"the {gateway.name} ended while starting:\n{gateway.log_tail()}")
            with suppress(OSError, ValueError):
                ready = json.loads(ready_file.read_text())
                if ready["pid"] == gateway.pid:
                    self._endpoints[process] = dict(ready["endpoints"])
                    return
            await asyncio.sleep(POLL_S / 2)
        raise StartFailed(
            f"the {gateway.name} was not ready within {GATEWAY_START_S:g} s:\n{gateway.log_tail()}\n"
            f"  its log: {gateway.log_file}"
        )

    async def _start_ray(self) -> None:
        ray = self._ray
        if ray is not None:
            try:
                await asyncio.to_thread(ray.start)
            except RayDidNotStart as error:
                raise StartFailed(f"{error}\n  its log: {ray.log_file}") from None
        self._ray_up.set()

    async def _stop_starting_ray(self, starting: asyncio.Future[None]) -> None:
        """Stop a Ray that is still starting.

        The start runs in a thread, and the thread ends only when the Ray process ends.
        """
        while self._ray is not None and not starting.done():
            await asyncio.to_thread(self._ray.stop)
            await asyncio.wait([starting], timeout=POLL_S)
        with suppress(StartFailed):
            await starting

    async def _start_controller(self) -> None:
        await self._ray_up.wait()
        environment = self._ray.environment() if self._ray is not None else {}
        self._controller.environment = {**self._environment(), **environment}
        self._controller.command = self._controller_command()
        await self._controller.start()
        self.write_state(str(self.run.state().get("phase", "starting")))

    # ---- supervision

    async def supervise(self) -> None:
        """Restart each part that dies, and report the death to the user. Runs until cancelled."""
        watches = [
            *(
                keep_alive(gateway, partial(self._restart_gateway, process), self._report)
                for process, gateway in enumerate(self._gateways)
            ),
            keep_alive(self._controller, self._start_controller, self._report),
        ]
        watches.append(self._report_models())
        if self._ray is not None:
            watches.append(self._replace_dead_ray())
        async with asyncio.TaskGroup() as group:
            for watch in watches:
                group.create_task(watch)

    async def _report_models(self) -> None:
        """Report new state reasons of models in the catalog.

        A state reason says why a model failed or how a replica's engine ended.
        """
        reported: dict[str, frozenset[str]] = {}
        admin = Admin(local_access(self.endpoints["admin"], self.config))
        try:
            while True:
                for entry in await self._catalog(admin):
                    parts = entry.state_reason.split("; ")
                    reasons = frozenset(part for part in parts if not PASSING.fullmatch(part))
                    for reason in sorted(reasons - reported.get(entry.name, reasons)):
                        self._report(f"{entry.name} is {entry.state.lower()}: {reason}")
                    reported[entry.name] = reasons
                await asyncio.sleep(MODELS_WATCH_S)
        finally:
            admin.close()

    async def _restart_gateway(self, process: int) -> None:
        await self._start_gateway(process)
        self.write_state("ready")

    async def _replace_dead_ray(self) -> None:
        """Start a new local Ray after the head of the old Ray has ended.

        The engines end together with the old Ray's head. So all processes of the old Ray are ended, and `keep_alive`
        restarts the controller on the new Ray.
        """
        while True:
            await asyncio.sleep(RAY_WATCH_S)
            if self._ray is not None and self._ray.is_draining and await self._has_no_workers():
                self._ray.kill()  # otherwise Ray waits for the processes of Ray Serve until the drain timeout
            if self._ray is None or self._ray.pid is not None:
                continue
            self._ray_up.clear()
            self._report(f"ray ended; starting a new one, models load again; its log: {self._ray.log_file}")
            gateway_pids = [gateway.pid for gateway in self._gateways if gateway.pid is not None]
            await asyncio.to_thread(reaper.end, self.instance, self._ray.folder, keep=gateway_pids)
            self._ray = self._new_ray()
            try:
                await self._start_ray()
            except StartFailed as error:
                self._report(str(error))

    async def _has_no_workers(self) -> bool:
        """Return True if no worker is linked any more, and False otherwise or if no gateway answers."""
        admin = Admin(local_access(self.endpoints["admin"], self.config))
        try:
            return not await asyncio.to_thread(admin.workers)
        except grpc.RpcError:
            return False
        finally:
            admin.close()

    # ---- end

    async def stop(self, step: StepLine) -> int:
        """Stop all parts. Returns the number of processes that are left over, normally 0."""
        self.write_state("stopping")
        step.show("gateway")
        await asyncio.gather(*(gateway.stop(DRAIN_S + 2.0) for gateway in self._gateways))
        step.show("controller")
        await self._controller.stop(CONTROLLER_GRACE_S)
        folder = None
        if self._ray is not None:
            step.show("ray")
            folder = self._ray.folder
            await asyncio.to_thread(self._ray.stop)
        await asyncio.to_thread(reaper.end, self.instance, folder)
        leftovers = await asyncio.to_thread(reaper.find, self.instance, folder)
        self.run.clear()
        return len(leftovers)

    # ---- state and command lines of the parts

    def write_state(self, phase: str) -> None:
        """Write state.json. The commands `status`, `down` and a second `up` read this file."""
        processes: dict[str, Any] = {}
        ray = self._ray.pid if self._ray is not None else None
        pids = {child.name: child.pid for child in (*self._gateways, self._controller)} | {"ray": ray}
        for name, pid in pids.items():
            if pid is not None:
                with suppress(Exception):  # the process has just died: the supervisor will report it
                    process = ProcessId.of(pid)
                    processes[name] = {"pid": process.pid, "created": process.created}
        own = ProcessId.of(os.getpid())
        self.run.write(
            {
                "name": self.config.name,
                "instance": self.instance,
                "phase": phase,
                "supervisor": {"pid": own.pid, "created": own.created},
                "processes": processes,
                "endpoints": self.endpoints,
                "siblings": [self._endpoints[process] for process in sorted(self._endpoints) if process],
                "config": str(self.run.config_file),
                "ray_folder": str(self._ray.folder) if self._ray is not None else "",
            }
        )

    def config_text(self) -> str:
        """Return the configuration for the parts as YAML: the user's configuration, with every port chosen."""
        plain: dict[str, Any] = self.config.model_dump(mode="json", exclude_unset=True, by_alias=True)
        plain.setdefault("gateway", {})["listen"] = self.config.gateway.listen.model_dump(mode="json")
        return yaml.safe_dump(plain, sort_keys=False)

    def _new_ray(self) -> LocalRay:
        drain_s = self.config.gateway.drain_timeout_s
        return LocalRay(LocalRaySettings(instance=self.instance, run_folder=self.run.path, drain_timeout_s=drain_s))

    def _environment(self) -> dict[str, str]:
        return {**os.environ, reaper.INSTANCE_ENV: self.instance, "PYTHONUNBUFFERED": "1"}

    def _command(self, *arguments: object) -> list[str]:
        return [sys.executable, "-m", "cluster.cli.main", *map(str, arguments)]

    def _ready_file(self, process: int) -> Path:
        return self.run.path / f"{part_name(process)}.json"

    def _new_gateway(self, process: int) -> Child:
        name = part_name(process)
        command = self._command(
            "gateway", "-f", self.run.config_file, "--process", process, "--folder", self.run.path / name,
            "--ready-file", self._ready_file(process), "--drain-s", min(DRAIN_S, self.config.gateway.drain_timeout_s),
        )  # fmt: skip
        return Child(name, command, self._environment(), self.run.log_file(name))

    def _controller_command(self) -> list[str]:
        dial = self.config.link.gateways or (_dial_address(self.endpoints["link"]),)
        ray = ("--ray-address", self._ray.address) if self._ray is not None else ()
        return self._command(
            "controller", "-f", self.run.config_file, "--folder", self.run.path / "controller",
            "--instance", self.instance, *ray, *(part for gateway in dial for part in ("--gateway", gateway)),
        )  # fmt: skip


def _dial_address(address: str) -> str:
    """Return the address to dial for a listener on this host.

    If the listener listens on all interfaces, the address is the loopback address.
    """
    host, port = address.rsplit(":", 1)
    return f"127.0.0.1:{port}" if host in ("0.0.0.0", "[::]") else address  # noqa: S104 - compared, not bound
