"""A local cluster: start Ray, gateway processes and a controller, restart processes that die, and end all processes.

Every process of a cluster has the cluster's instance id in the environment variable HEADRACE_INSTANCE. Stopping the
cluster ends all processes with the cluster's instance id. So no process is left over, and another Ray, vLLM or Headrace
on the machine is never touched.
"""

from __future__ import annotations

import asyncio
import os
import uuid
from collections.abc import Callable
from contextlib import closing, suppress
from functools import partial
from typing import Any

import yaml

from cluster.admin.v1 import admin_pb2
from cluster.cli.base import replace_file
from cluster.cli.local import model_states
from cluster.cli.local.children import Child, StartFailed, headrace_command, keep_alive
from cluster.cli.local.gateway_processes import GatewayProcesses
from cluster.cli.local.ray_process import RayProcess, link_session
from cluster.cli.local.run_folder import ProcessId, RunFolder
from cluster.cli.local.step_lines import StepLine, duration
from cluster.cli.target.access import local_access
from cluster.cli.target.admin_client import Admin
from cluster.config.schema import Config
from cluster.ray import reaper
from cluster.ray.local_cluster import LocalRaySettings

CONTROLLER_GRACE_S = 8.0


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
        settings = LocalRaySettings(self.instance, run.path, drain_timeout_s=config.gateway.drain_timeout_s)
        self._ray = None if config.ray else RayProcess(settings)
        environment = {**os.environ, reaper.INSTANCE_ENV: self.instance, "PYTHONUNBUFFERED": "1"}
        self._gateways = GatewayProcesses(config, run, environment)
        command = headrace_command(
            "controller", "-f", run.config_file, "--folder", run.path / "controller", "--instance", self.instance
        )
        self._controller = Child("controller", command, environment, run.log_file("controller"))

    def __repr__(self) -> str:
        return f"LocalCluster({self.config.name}, {self.instance})"

    @property
    def endpoints(self) -> dict[str, str]:
        """Addresses (host:port) of the first gateway process, by listener name. Empty until the process is up."""
        return self._gateways.endpoints

    # ---- start

    async def start(self, step: StepLine) -> None:
        """Start Ray, the gateways and the controller. Raises StartFailed."""
        replace_file(self.run.config_file, self.config_text())
        self.write_state("starting")
        for child in (*self._gateways.children, self._controller):
            child.log_file.write_bytes(b"")
        link_session(self.run.path / "ray-session", self._ray.folder if self._ray is not None else None)
        step.show("starting ray and the gateway")
        ray = asyncio.ensure_future(self._ray.start()) if self._ray is not None else None
        try:
            await self._gateways.start()
            step.show(f"gateway up in {duration(step.elapsed_s)}, ray starting")
            if ray is not None:
                await asyncio.shield(ray)
        except BaseException:  # including Ctrl-C: a Ray that is still starting must not outlive this process
            if self._ray is not None and ray is not None:
                await self._ray.stop_starting(ray)
            raise
        await self._start_controller()
        self.write_state("starting")

    async def wait_for_models(self, step: StepLine) -> list[admin_pb2.CatalogEntry]:
        """Wait until each model is READY, IDLE or FAILED in the gateway's catalog. Returns the catalog's entries.

        Raises StartFailed if each model is FAILED, or if a process of the cluster ends.
        """

        def show(text: str) -> None:
            self._check_processes()
            step.show(text)

        wanted = {model.name for model in self.config.models}
        with self._admin() as admin:
            entries = await model_states.wait_until_settled(admin, wanted, show)
        if wanted and not any(entry.state in model_states.SERVED for entry in entries):
            reasons = "\n".join(f"  {e.name}: {e.state_reason or 'no reason given'}" for e in entries)
            ray_logs = self._ray.folder if self._ray is not None else "on the Ray cluster"
            raise StartFailed(f"no model became READY:\n{reasons}\n  logs: {self.run.path}, {ray_logs}")
        return entries

    def _check_processes(self) -> None:
        """Raise StartFailed if a process has ended. During the start, no process is restarted."""
        for child in (*self._gateways.children, self._controller):
            if child.pid is None:
                raise StartFailed(
                    f"the {child.name} ended while the models were loading:\n{child.log_tail()}\n"
                    f"  its log: {child.log_file}"
                )
        if self._ray is not None and self._ray.pid is None:
            raise StartFailed(
                f"ray ended while the models were loading:\n{self._ray.log_tail()}\n"
                f"  its logs: {self.run.path / 'ray-logs'}"
            )

    def _admin(self) -> closing[Admin]:
        return closing(Admin(local_access(self.endpoints["admin"], self.config)))

    async def _start_controller(self) -> None:
        address, environment = await self._ray.address() if self._ray is not None else ("", {})
        ray = ("--ray-address", address) if address else ()
        dial = self.config.link.gateways or (_dial_address(self.endpoints["link"]),)
        gateways = (part for gateway in dial for part in ("--gateway", gateway))
        await self._controller.start([*ray, *gateways], environment)
        self.write_state(str(self.run.state().get("phase", "starting")))

    # ---- supervision

    async def supervise(self) -> None:
        """Restart each part that dies, and report the death to the user. Runs until cancelled."""
        async with asyncio.TaskGroup() as group:
            for process, gateway in enumerate(self._gateways.children):
                group.create_task(keep_alive(gateway, partial(self._restart_gateway, process), self._report))
            group.create_task(keep_alive(self._controller, self._start_controller, self._report))
            group.create_task(self._report_models())
            if self._ray is not None:
                group.create_task(self._ray.replace_when_dead(self._has_no_workers, self._gateways.pids, self._report))

    async def _restart_gateway(self, process: int) -> None:
        await self._gateways.start_process(process)
        self.write_state("ready")

    async def _report_models(self) -> None:
        with self._admin() as admin:
            await model_states.report_reasons(admin, self._report)

    async def _has_no_workers(self) -> bool:
        with self._admin() as admin:
            return await model_states.has_no_workers(admin)

    # ---- end

    async def stop(self, step: StepLine) -> int:
        """Stop all parts. Returns the number of processes that are left over, normally 0."""
        self.write_state("stopping")
        step.show("gateway")
        await self._gateways.stop()
        step.show("controller")
        await self._controller.stop(CONTROLLER_GRACE_S)
        folder = None
        if self._ray is not None:
            step.show("ray")
            folder = self._ray.folder
            await self._ray.stop()
        await asyncio.to_thread(reaper.end, self.instance, folder)
        leftovers = await asyncio.to_thread(reaper.find, self.instance, folder)
        self.run.clear()
        return len(leftovers)

    # ---- files in the run folder

    def write_state(self, phase: str) -> None:
        """Write state.json. The commands `status`, `down` and a second `up` read this file."""
        processes: dict[str, Any] = {}
        pids = {child.name: child.pid for child in (*self._gateways.children, self._controller)}
        pids["ray"] = self._ray.pid if self._ray is not None else None
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
                "siblings": self._gateways.siblings,
                "config": str(self.run.config_file),
                "ray_folder": str(self._ray.folder) if self._ray is not None else "",
            }
        )

    def config_text(self) -> str:
        """Return the user's configuration as YAML. Each port 0 is replaced by the free port that was chosen for it.

        Every process of the cluster reads this text from a file.
        """
        plain: dict[str, Any] = self.config.model_dump(mode="json", exclude_unset=True, by_alias=True)
        plain.setdefault("gateway", {})["listen"] = self.config.gateway.listen.model_dump(mode="json")
        return yaml.safe_dump(plain, sort_keys=False)


def _dial_address(address: str) -> str:
    """Return the address to dial for a listener on this host.

    If the listener listens on all interfaces, the address is the loopback address.
    """
    host, port = address.rsplit(":", 1)
    return f"127.0.0.1:{port}" if host in ("0.0.0.0", "[::]") else address  # noqa: S104 - compared, not bound
