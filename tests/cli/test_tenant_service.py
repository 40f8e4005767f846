"""Tenant commands over a gateway's admin API have the same results as tenant commands on the database."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cluster.admin.v1 import admin_pb2
from cluster.cli.local.run_folder import ProcessId, RunFolder
from cluster.cli.remote_tenant_service import AdminConnection, RemoteTenantService, RemoteUsageReports
from cluster.cli.target.access import Access
from cluster.cli.tenant_service import LedgerServices
from cluster.config.document import parse
from cluster.ledger.errors import LedgerError
from cluster.ledger.rows import NewKey, StoredKey, StoredTenant, UsageQuery
from cluster.ledger.tenants.service import Actor, LedgerTenantService
from cluster.ledger.usage.reports import LedgerUsageReports
from tests.ledger.samples import record
from tests.support.admin import AdminClient, role_key, until_known
from tests.support.certificates import Authority
from tests.support.keyed import Keyed, eventually, keyed_cluster
from tests.support.shell import headrace

DECLARED = (
    "tenant_defaults: {limits: {daily_tokens: 7}}\ntenants: [{name: fixed}]\n"
    "cost: {currency: EUR, gpu_hour: {H100: 2}}\n"
)
OTHER_WORDS = {"bad name", "unknown field"}
"""Steps with an error that names a protobuf field instead of a field of the configuration.

The error texts of these steps are not compared.
"""


@pytest.fixture(scope="module")
async def keyed(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Keyed]:
    """A gateway with authentication and a tenant that is declared in the configuration file."""
    async with keyed_cluster(tmp_path_factory.mktemp("desk"), DECLARED) as keyed:
        yield keyed


@pytest.fixture(scope="module")
async def key(keyed: Keyed) -> str:
    """An operator's API key that the gateway already knows."""
    key = await role_key(keyed.ledger, "ops", "operator")
    async with AdminClient(keyed.gateway.endpoints["admin"], key) as client:
        await until_known(client, "Catalog.List", admin_pb2.ListRequest())
    return key


@pytest.fixture
def at(keyed: Keyed, key: str, tmp_path: Path) -> tuple[str, ...]:
    """The command line options that select the gateway."""
    (tmp_path / "key").write_text(key + "\n")
    return ("--admin", keyed.gateway.endpoints["admin"], "--api-key-file", str(tmp_path / "key"))


async def cli(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a command in a subprocess and return the completed process."""
    return await asyncio.to_thread(headrace, *arguments)


async def good(*arguments: str) -> Any:
    """Run a command with --json and return the JSON value that the command printed."""
    done = await cli(*arguments, "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


# ---- one interface, two implementations


def script(name: str) -> Iterator[tuple[str, Callable[[LedgerServices, list[Any]], Any]]]:
    """Yield an operator's steps with the tenant `name`, as pairs of a title and a function.

    The function takes the services and the keys that earlier steps have created. Some steps are invalid.
    """
    usage = UsageQuery(("model", "label:team"), tenant=name)
    yield "create", lambda d, _: d.tenants.create_tenant(name, {"class": "batch", "limits": {"tokens_per_minute": 5}})
    yield "twice", lambda d, _: d.tenants.create_tenant(name, {})
    yield "without a default", lambda d, _: d.tenants.create_tenant(f"{name}x", {"limits": {"daily_tokens": None}})
    yield "bad name", lambda d, _: d.tenants.create_tenant("Bad", {})
    yield "bad limit", lambda d, _: d.tenants.create_tenant("b", {"limits": {"tokens_per_minute": 0}})
    yield "unknown field", lambda d, _: d.tenants.create_tenant("b", {"wieght": 1})
    yield "get", lambda d, _: d.tenants.get_tenant(name)
    yield "missing", lambda d, _: d.tenants.get_tenant("missing")
    yield "list", lambda d, _: [t for t in d.tenants.tenants() if t.policy.name.startswith(name)]
    yield "update", lambda d, _: d.tenants.update_tenant(name, {"labels": {"a.b": "1", "c": "2"}, "weight": 2.5})
    yield (
        "take away",
        lambda d, _: d.tenants.update_tenant(name, {"labels": {"c": None}, "limits": {"daily_tokens": None}}),
    )
    yield "take all away", lambda d, _: d.tenants.update_tenant(name, {"limits": None, "models": ["x", "y*"]})
    yield "guards", lambda d, _: d.tenants.update_tenant(name, {"guards": [{"builtin": "sizes", "max_characters": 5}]})
    named = {"builtin": "patterns", "on": "output", "action": "redact", "patterns": {"mail": "[a-z]{1,9}@x"}}
    yield (
        "patterns",
        lambda d, _: d.tenants.update_tenant(name, {"guards": [named, {"builtin": "sizes", "max_messages": 3}]}),
    )
    yield (
        "bad patterns",
        lambda d, _: d.tenants.update_tenant(name, {"guards": [{**named, "patterns": {"mail": "a+"}}]}),
    )
    yield "bad class of fixed", lambda d, _: d.tenants.update_tenant("fixed", {"weight": 3})
    yield "suspend", lambda d, _: d.tenants.suspend_tenant(name, True, reason="x")
    yield "suspend for nothing", lambda d, _: d.tenants.suspend_tenant(name, True)
    yield "resume", lambda d, _: d.tenants.suspend_tenant(name, False)
    yield "key", lambda d, _: d.tenants.create_key(name, "ci", expires_at=4e9, role="viewer", reason="ci")
    yield "rotate", lambda d, made: d.tenants.rotate_key(name, made[-1].stored.id, overlap_s=60.0)
    yield "revoke", lambda d, made: d.tenants.revoke_key(name, made[-1].stored.id, reason="x")
    yield "rotate the revoked", lambda d, made: d.tenants.rotate_key(name, made[-1].stored.id, overlap_s=60.0)
    yield "bad role", lambda d, _: d.tenants.create_key(name, role="root")
    yield "no such key", lambda d, _: d.tenants.revoke_key(name, "k0", reason="x")
    yield "keys", lambda d, _: d.tenants.keys(name)
    yield "keys of nobody", lambda d, _: d.tenants.keys("missing")
    yield "usage", lambda d, _: d.reports.usage(usage)
    yield "cost", lambda d, _: d.reports.usage(usage, cost=True)
    yield "in all", lambda d, _: d.reports.usage(UsageQuery((), tenant=name))
    yield "records", lambda d, _: list(d.reports.records(usage))
    yield "slo", lambda d, _: d.reports.slo(usage)
    yield "audit", lambda d, _: [event | {"actor": "", "source": ""} for event in d.reports.audit(tenant=name)]
    yield (
        "some audit",
        lambda d, _: len(list(d.reports.audit(tenant=name, equal={"action": "keys.create"}, since_s=1.0))),
    )
    yield "not deleted", lambda d, _: d.tenants.undelete_tenant(name)
    yield "delete", lambda d, _: d.tenants.delete_tenant(name, reason="x")
    yield "undelete", lambda d, _: d.tenants.undelete_tenant(name, reason="a mistake")
    yield "keys again", lambda d, _: d.tenants.keys(name)
    yield "undelete nobody", lambda d, _: d.tenants.undelete_tenant("missing")
    yield "undelete fixed", lambda d, _: d.tenants.undelete_tenant("fixed")
    yield "delete again", lambda d, _: d.tenants.delete_tenant(name, reason="x")
    yield "erase", lambda d, _: d.tenants.delete_tenant(name, erase=True, reason="x") > 0
    yield "erase again", lambda d, _: d.tenants.delete_tenant(name, erase=True, reason="x")


def transcript(services: LedgerServices, name: str) -> list[tuple[str, Any]]:
    """Run all steps of `script`. Returns the result of each step, from which names, ids and times are removed."""
    results: list[tuple[str, Any]] = []
    made: list[Any] = []
    for step, act in script(name):
        try:
            result = act(services, made)
            made += [result] if isinstance(result, NewKey) else []
        except LedgerError as error:
            result = type(error).__name__, "" if step in OTHER_WORDS else str(error)
        results.append((step, _plain(result, name, made)))
    return results


def _plain(value: Any, name: str, made: list[NewKey]) -> Any:
    if isinstance(value, NewKey):
        assert value.secret.startswith("hr_")
        value = value.stored
    if isinstance(value, StoredKey):
        known = [key.stored.id for key in made]
        value = replace(value, id="", created_at=0.0, revoked_at=value.revoked_at and 1.0, expires_at=None)
        value = replace(value, rotated_from=str(known.index(value.rotated_from)) if value.rotated_from else "")
    if isinstance(value, StoredTenant):
        policy = replace(value.policy, labels=dict(sorted(value.policy.labels.items())))
        value = replace(value, policy=policy, created_at=0.0, updated_at=0.0)
    if isinstance(value, list):
        return [_plain(item, name, made) for item in value]
    if isinstance(value, dict):
        value = {k: v for k, v in value.items() if k not in ("at_s", "event_id", "details")}
    text = repr(value)
    for key in made:
        text = text.replace(key.stored.id, "KEY")
    return text.replace(name, "NAME")


@pytest.mark.slow
async def test_both_desks_do_the_same(keyed: Keyed, key: str) -> None:
    """Each step has the same result or the same error text on the database and over the gateway's admin API."""
    for name in ("t-here", "t-over"):
        keyed.ledger.usage.insert(
            [
                record(
                    f"{name}-{at}", tenant=name, request_id=f"{name}-{at}", ttft_s=None if at else 0.5, model=f"m{at}"
                )
                for at in range(3)
            ]
        )
    config = parse(keyed.file.read_text())
    tenants = LedgerTenantService(
        keyed.ledger,
        Actor("cli:me"),
        lambda event: keyed.ledger.audit.insert([event]),
        config.tenant_defaults.policy,
        clock=time.time,
        classes=[priority_class.name for priority_class in config.classes],
    )
    rates = None if config.cost is None else _rates(config.cost)
    local = LedgerServices(tenants, LedgerUsageReports(keyed.ledger, rates=rates))
    connection = AdminConnection(Access(keyed.gateway.endpoints["admin"], key))
    remote = LedgerServices(RemoteTenantService(connection), RemoteUsageReports(connection))
    try:
        transcripts = [
            await asyncio.to_thread(transcript, services, name)
            for services, name in ((local, "t-here"), (remote, "t-over"))
        ]
    finally:
        connection.close()
    for local_step, remote_step in zip(*transcripts, strict=True):
        assert local_step == remote_step
    assert len({repr(text) for _, text in transcripts[0]}) > 20, "steps with equal results would prove nothing"


def _rates(cost: Any) -> Any:
    from cluster.ledger.rows import Prices

    return Prices(cost.currency, dict(cost.gpu_hour))


# ---- the commands


@pytest.mark.slow
async def test_from_nothing_to_a_call(keyed: Keyed, at: tuple[str, ...]) -> None:
    """An operator can create a tenant and a key, suspend the tenant, and read usage and audit over the admin port."""
    made = await good("tenants", "create", "shop", "--weight", "4", "--set", "limits.daily_tokens=null", *at)
    assert (made["weight"], made["limits"]["daily_tokens"], made["origin"]) == (4.0, None, "api")
    done = await cli("keys", "create", "shop", "--name", "ci", *at)
    assert (done.returncode, done.stdout.startswith("hr_k")) == (0, True), done.stderr
    secret = done.stdout.strip()
    await keyed.until_known("shop", secret)
    keys = await cli("keys", "list", "shop", *at)
    assert ("active" in keys.stdout, secret in keys.stdout) == (True, False)
    assert "suspended shop" in (await cli("tenants", "suspend", "shop", "--reason", "unpaid", *at)).stdout
    assert "unpaid" in (await cli("audit", "--tenant", "shop", *at)).stdout
    keyed.ledger.usage.insert([record("shop-1", tenant="shop")])
    assert (await good("usage", "--tenant", "shop", "--cost", *at))[0]["currency"] == "EUR"
    rows = await good("usage", "--tenant", "shop", "--records", *at)
    assert [(row["record_id"], row["reasoning_tokens"]) for row in rows] == [("shop-1", 2)]
    assert rows[0]["predicted_cached_tokens"] is None
    assert (await good("usage", "--tenant", "shop", *at))[0]["reasoning_tokens"] == 2
    csv = await cli("usage", "--tenant", "shop", "--csv", *at)
    assert csv.stdout.splitlines()[0].startswith("tenant,model,requests")
    assert ",completion_tokens,reasoning_tokens," in csv.stdout.splitlines()[0]


@pytest.mark.slow
async def test_exit_codes(keyed: Keyed, at: tuple[str, ...], tmp_path: Path) -> None:
    """A command ends with exit code 0 on success, 1 on failure, 2 after invalid usage, and 3 if the gateway or database
    is unreachable. An error prints no traceback."""
    (tmp_path / "bad").write_text("hr_k1_" + "x" * 43)
    admin = keyed.gateway.endpoints["admin"]
    for arguments, code, words in (
        (("tenants", "get", "none", *at), 1, "tenants/none does not exist"),
        (("tenants", "suspend", "fixed", "--reason", "x", *at), 1, "declared in a file"),
        (("tenants", "create", "b", "--set", "limits.daily_tokens=-1", *at), 2, "limits.daily_tokens"),
        (("tenants", "create", "b", "--class", "gold", *at), 2, "class"),
        (("tenants", "suspend", "b", *at), 2, "--reason"),
        (("usage", "--group-by", "shoe", *at), 2, "shoe"),
        (("usage", "--gpu-hour", "H100=1", *at), 2, "--gpu-hour"),
        (("abort", "nothing", "--reason", "x", *at), 1, "on this gateway"),
        (("abort", "nothing", "--reason", "x", *at, "--admin", admin), 1, "try the other gateways"),
        (("abort", "nothing", "--reason", " ", *at), 2, "reason"),
        (("status", "--admin", admin), 1, "UNAUTHENTICATED_KEY"),
        (("status", *at), 0, ""),
        (("tenants", "list", "--admin", admin, "--api-key-file", str(tmp_path / "bad")), 1, "UNAUTHENTICATED_KEY"),
        (("tenants", "list", "--admin", "127.0.0.1:1"), 3, "no gateway answers"),
        (("abort", "x", "--reason", "x", "--admin", "127.0.0.1:1"), 3, "no gateway answers"),
        (("tenants", "list", "--tls-ca", "/no/such/file", *at), 2, "--tls-ca"),
        (("tenants", "list", "-f", str(keyed.file), *at), 2, "give one of them"),
        (("tenants", "list", "-f", str(keyed.file)), 0, ""),
    ):
        done = await cli(*arguments)
        assert (done.returncode, words in done.stderr) == (code, True), (arguments, done.stdout, done.stderr)
        assert "Traceback" not in done.stderr


@pytest.mark.slow
async def test_the_environment_says_where(keyed: Keyed, key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """HEADRACE_ENDPOINT and HEADRACE_API_KEY select a gateway, unless -f is given on the command line."""
    host = keyed.gateway.endpoints["admin"].rsplit(":", 1)[0]
    monkeypatch.setenv("HEADRACE_ENDPOINT", f"{host}:1")
    monkeypatch.setenv("HEADRACE_API_KEY", key)
    done = await cli("tenants", "list")
    assert (done.returncode, f"{host}:50053" in done.stderr) == (3, True), "the admin port of that host is asked"
    assert (await cli("tenants", "list", "--admin", keyed.gateway.endpoints["admin"])).returncode == 0
    assert "fixed" in (await cli("tenants", "list", "-f", str(keyed.file))).stdout


@pytest.mark.slow
async def test_a_local_cluster_needs_no_key(tmp_path: Path, cache: Path) -> None:
    """If a local cluster has TLS and authentication, commands use the credentials in the cluster's run folder.

    Without a configuration in the run folder, the commands are refused as unauthenticated.
    """
    files = Authority(tmp_path / "ours").issue("gateway.example.com")
    tls = f"  tls: {{cert_file: {files.cert_file}, key_file: {files.key_file}}}\n"
    async with keyed_cluster(tmp_path / "k", "tenants: [{name: fixed}]\n", tls) as keyed:
        folder = RunFolder("here")
        folder.path.mkdir(parents=True)
        own = ProcessId.of(os.getpid())
        endpoints = dict(keyed.gateway.endpoints)
        folder.write({"supervisor": {"pid": own.pid, "created": own.created}, "endpoints": endpoints})
        admin = ("--admin", endpoints["admin"])
        ca = ("--tls-ca", str(files.ca_file))
        assert "UNAUTHENTICATED_KEY" in (await cli("tenants", "list", *admin, *ca)).stderr
        folder.config_file.write_text(keyed.file.read_text())
        await eventually(lambda: _lists(admin, "fixed"), "the declared tenant is listed")
        status = await cli("status")
        assert (status.returncode, "no models" in status.stdout) == (0, True), status.stderr
        assert (await cli("abort", "x", "--reason", "x")).returncode == 1


async def _lists(admin: tuple[str, ...], name: str) -> bool:
    done = await cli("tenants", "list", *admin)
    return done.returncode == 0 and name in done.stdout
