"""The documented renewal of certificates, done twice: API keys and clients of the first install keep working.

The command lines are read from docs/kubernetes.md and run unchanged. `kubectl` is replaced by a dictionary of Secrets
that refuses the same requests as Kubernetes: a second `create`, and any change of an immutable Secret. A gateway in a
separate process reads the Secrets as the files of its pod.
"""

from __future__ import annotations

import asyncio
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import yaml
from grpc_health.v1 import health_pb2, health_pb2_grpc

from cluster.client import Client
from cluster.ledger.files import read_secrets
from cluster.ledger.store import Ledger
from cluster.policy.tenants.policy import TenantPolicy
from cluster.process.ports import free_port
from loadtests.children import ROOT, Child, Children
from loadtests.figures import Bound, Figure
from loadtests.scenarios.common import Stage

DOCS = ROOT / "docs" / "kubernetes.md"
KEYS, RENEWALS = 20, 2
WORKING = "API keys that still work after the documented renewal twice, share"
ROWS: Mapping[str, Bound] = {WORKING: Bound(">=", 1.0)}
START_S, CALL_S = 60.0, 20.0


@dataclass(frozen=True, slots=True)
class Line:
    """A documented command line: `headrace pod secrets|certificates ... | kubectl create|apply -f -`."""

    words: Sequence[str]
    verb: str


def documented_lines(text: str) -> list[Line]:
    """Return the `headrace pod ... | kubectl ...` command lines in `text`, the content of docs/kubernetes.md. They are
    in the order of the page: the first install, then the renewal."""
    matches = re.findall(
        r"^ {4,}headrace (pod (?:secrets|certificates)[^|\n]*)\| kubectl (create|apply) -f -$", text, re.MULTILINE
    )
    return [Line(shlex.split(words), verb) for words, verb in matches]


class Refused(Exception):
    """Raised when the API server refuses a request. The message says why."""


@dataclass
class SecretStore:
    """Secrets of one namespace by name, with the rules of an API server."""

    secrets: dict[str, dict[str, Any]] = field(default_factory=dict)

    def apply(self, verb: str, manifests: str) -> None:
        """Apply the YAML as `kubectl create` or `kubectl apply` does; kinds other than Secret are ignored. Raises
        Refused.
        """
        for manifest in yaml.safe_load_all(manifests):
            if manifest["kind"] != "Secret":
                continue
            name = manifest["metadata"]["name"]
            old = self.secrets.get(name)
            if old is not None and verb == "create":
                raise Refused(f'secrets "{name}" already exists')
            kept = old is None or (manifest.get("immutable") and old["stringData"] == manifest["stringData"])
            if old is not None and old.get("immutable") and not kept:
                raise Refused(
                    f'Secret "{name}" is invalid: data: Forbidden: field is immutable when `immutable` is set'
                )
            self.secrets[name] = manifest

    def data(self, name: str) -> dict[str, str]:
        """Return the values of one Secret."""
        values: dict[str, str] = self.secrets[name]["stringData"]
        return values

    def write_files(self, folder: Path) -> None:
        """Write the Secrets as the files that pods read: FOLDER/<name without the release's name>/<key>."""
        for name in self.secrets:
            for key, value in self.data(name).items():
                file = folder / name.removeprefix("headrace-") / key
                file.parent.mkdir(parents=True, exist_ok=True)
                draft = file.with_name(f".{key}")
                draft.write_text(value)
                draft.replace(file)


def run_line(line: Line, folder: Path, store: SecretStore) -> None:
    """Run a command line of the docs in `folder`, and apply its output to `store` as kubectl would do. Raises
    RuntimeError with the command's errors if the command fails, and Refused if `store` refuses the output."""
    done = subprocess.run(
        [sys.executable, "-m", "cluster.cli.main", *line.words],
        capture_output=True,
        text=True,
        check=False,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        timeout=60,
        stdin=subprocess.DEVNULL,
    )
    if done.returncode:
        raise RuntimeError(f"headrace {shlex.join(line.words)}: {done.stderr.strip()}")
    store.apply(line.verb, done.stdout)


class Release:
    """A gateway of an installed chart. The gateway reads the files that a SecretStore has written to `files`."""

    def __init__(self, children: Children, files: Path) -> None:
        self._children = children
        self._files = files
        self._config = files / "cluster.yaml"
        self._ports = {name: free_port() for name in ("grpc", "http", "link", "admin", "metrics")}
        self._config.write_text(yaml.safe_dump(self._settings()))
        self._gateway: Child | None = None

    def _settings(self) -> dict[str, Any]:
        files = self._files

        def pair(name: str) -> dict[str, str]:
            return {"cert_file": f"{files}/{name}/tls.crt", "key_file": f"{files}/{name}/tls.key"}

        return {
            "api_version": "headrace/v1",
            "name": "renewal",
            "gateway": {
                "listen": {name: f"0.0.0.0:{port}" for name, port in self._ports.items()},
                "tls": pair("tls"),
                "link_tls": {**pair("link-gateway"), "ca_file": f"{files}/link-gateway/ca.crt"},
                "drain_timeout_s": 1,
            },
            "auth": {
                "cluster_secret_file": f"{files}/secrets/cluster",
                "api_keys": {"pepper_file": f"{files}/secrets/key-pepper"},
            },
            "store": {"database_url": f"sqlite:///{files}/ledger.db"},
            "models": [],
        }

    def make_keys(self, count: int) -> list[str]:
        """Return `count` API keys of a new tenant."""
        peppers = read_secrets(self._files / "secrets" / "key-pepper", "pepper")
        ledger = Ledger(f"sqlite:///{self._files}/ledger.db", peppers=peppers)
        try:
            ledger.upgrade()
            ledger.tenants.create(TenantPolicy("acme"))
            return [ledger.keys.create("acme").secret for _ in range(count)]
        finally:
            ledger.close()

    async def start(self) -> None:
        """Start the gateway, after stopping the gateway that runs. Raises DidNotStart."""
        if self._gateway is not None:
            await self._gateway.stop()
        health = f"127.0.0.1:{free_port()}"
        arguments = ["-f", str(self._config), "--folder", str(self._files / "gateway"), "--health", health]
        command = [sys.executable, "-m", "cluster.cli.main", "pod", "gateway", *arguments]
        environment = {"HEADRACE_CACHE_DIR": str(self._files / "cache"), "PYTHONPATH": str(ROOT)}
        self._gateway = self._children.start("gateway", "gateway", command, environment)
        await self._gateway.until(lambda: _serves(health), "its health port answers", START_S)

    async def working_keys(self, keys: Sequence[str], ca_file: Path) -> int:
        """Return how many of the API keys work. A key works if it can list the models over a new connection that trusts
        only `ca_file`."""
        return sum(await asyncio.gather(*(asyncio.to_thread(self._key_works, key, ca_file) for key in keys)))

    def _key_works(self, key: str, ca_file: Path) -> bool:
        address = f"localhost:{self._ports['grpc']}"
        try:
            with Client(address, api_key=key, tls_ca_file=ca_file, timeout_s=CALL_S) as client:
                return client.models() == []
        except Exception:  # any exception means that the key does not work
            return False


async def _serves(address: str) -> bool:
    try:
        async with grpc.aio.insecure_channel(address) as channel:
            stub: Any = health_pb2_grpc.HealthStub(channel)
            answer = await stub.Check(health_pb2.HealthCheckRequest(), timeout=2)
            return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)
    except grpc.aio.AioRpcError:
        return False


async def renew(children: Children, folder: Path, keys: int, say: Callable[[str], None]) -> float:
    """Run the documented installation, and then the renewal of the certificates RENEWALS times. After each renewal,
    call the gateway that kept running and a restarted gateway, with each of `keys` API keys. Return the lowest share of
    keys that work. Raises RuntimeError, Refused, DidNotStart."""
    install, renewal = documented_lines(DOCS.read_text())
    store, files = SecretStore(), folder / "pod"
    folder.mkdir(parents=True, exist_ok=True)
    await asyncio.to_thread(run_line, install, folder, store)
    store.write_files(files)
    pinned = folder / "pinned.crt"
    pinned.write_text(store.data("headrace-tls")["ca.crt"])
    release = Release(children, files)
    made = await asyncio.to_thread(release.make_keys, keys)
    await release.start()
    lowest = await release.working_keys(made, pinned)
    for _ in range(RENEWALS):
        served = store.data("headrace-tls")["tls.crt"]
        await asyncio.to_thread(run_line, renewal, folder, store)
        if store.data("headrace-tls")["tls.crt"] == served:
            raise RuntimeError("the documented renewal issued no new certificate")
        store.write_files(files)
        running = await release.working_keys(made, pinned)
        await release.start()
        restarted = await release.working_keys(made, pinned)
        say(f"{running} of {keys} keys work after a renewal, {restarted} after a restart")
        lowest = min(lowest, running, restarted)
    return lowest / keys


async def measure(stage: Stage) -> list[Figure]:
    """Renew the certificates twice, as the documentation says, and measure the share of API keys that still work
    afterwards."""
    from loadtests.scenarios.parts import exact

    try:
        share = await renew(stage.children, stage.folder / "renewal", KEYS, stage.screen.say)
    except Refused as refused:
        raise RuntimeError(f"kubectl refuses the documented renewal: {refused}") from None
    note = "each renewal: a gateway that ran meanwhile, and one started since; clients pin the first CA"
    return [exact(WORKING, share, ROWS[WORKING], "", note)]
