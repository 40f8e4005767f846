"""The command `support-bundle`, which collects what a developer needs to understand a cluster, without its secrets."""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from cluster import __version__
from cluster.cli.common import err, fail, local_run, out
from cluster.cli.ledger import ConfigOption
from cluster.cli.local.run_folder import RunFolder
from cluster.cli.support import sources
from cluster.cli.support.archive import redacted_files, write_archive
from cluster.cli.support.parts import Parts
from cluster.cli.support.redaction import Redactor, Rules, tenant_labels, tenant_names
from cluster.cli.target.access import Access, admin_access
from cluster.cli.target.admin_client import Admin
from cluster.cli.target.contexts import ClusterTarget
from cluster.cli.target.target_options import with_admin_target

MOST_S = 60.0
SECRET_VARIABLES = ("HEADRACE_API_KEY", "HEADRACE_DATABASE_PASSWORD", "HEADRACE_LITELLM_PASSWORD", "HF_TOKEN")
CONFIGURATION, OVERVIEW, CATALOG = "configuration.json", "overview.json", "catalog.json"
FilesOption = list[Path] | None


@with_admin_target
def support_bundle(
    target: ClusterTarget,
    output: Annotated[
        Path | None,
        typer.Option(
            "-o", "--output", help="The archive to write.", show_default="headrace-support-TIME.tar.gz", dir_okay=False
        ),
    ] = None,
    file: ConfigOption = None,
    values: Annotated[
        FilesOption, typer.Option("--values", help="A file with values of the chart; repeatable.", dir_okay=False)
    ] = None,
    log: Annotated[
        FilesOption, typer.Option("--log", help="A file with log lines of a process; repeatable.", dir_okay=False)
    ] = None,
    metrics: Annotated[
        list[str] | None, typer.Option("--metrics", help="A metrics address, host:port; repeatable.")
    ] = None,
    hash_names: Annotated[bool, typer.Option("--hash-names", help="Replace tenants' names by hashes.")] = False,
    timeout_s: Annotated[
        float, typer.Option("--timeout-s", help="Time after which nothing more is collected.", min=1, max=600)
    ] = MOST_S,
) -> None:
    """Write an archive for a bug report, without secrets. It has the configuration, state, decisions, metrics and log
    events; keys, tokens, passwords and texts of prompts are not in it. manifest.json lists what was left out and why.
    Read the archive before you send it."""
    access, run, now_s = admin_access(target), local_run(), time.time()
    if run is not None and run.endpoints().get("admin") != access.address:
        run = None
    if file is None and run is not None:
        file = run.config_file
    parts, rules = Parts(time.monotonic() + timeout_s), Rules(sources.known_keys())
    _collect_files(parts, rules, file, values or (), [*(log or ()), *_logs(run)])
    _collect_state(parts, access)
    _collect_metrics(parts, _metrics_addresses(metrics or (), run, parts.documents.get(CONFIGURATION)))
    rules.secrets |= {access.key, *(os.environ.get(name, "") for name in SECRET_VARIABLES)}
    redactor = Redactor(rules.secrets, secrets.token_bytes(16) if hash_names else None, _tenants(parts))
    stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime(now_s))
    target_file = output or Path(f"headrace-support-{stamp}.tar.gz")
    files = redacted_files(parts, redactor, _about(now_s, hash_names, rules))
    try:
        write_archive(target_file, files, f"headrace-support-{stamp}", now_s)
    except OSError as error:
        fail(f"{target_file}: cannot be written: {error.strerror}")
    for name, reason in sorted(parts.left_out.items()):
        err.print(redactor.text(f"left out: {name}: {reason}"), markup=False)
    out.print(f"wrote {target_file}: {len(files)} files; read it before you send it", markup=False)


def _about(now_s: float, hash_names: bool, rules: Rules) -> dict[str, Any]:
    """Return the fields of the manifest about the bundle as a whole."""
    return {
        "headrace": __version__,
        "made_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(now_s)),
        "has_hashed_names": hash_names,
        "redacted_settings": sorted(rules.left_out),
        "never_included": [
            "texts of prompts and answers",
            "keys, tokens, passwords, peppers, private keys, and the contents of secret files",
            "usage records, the audit log and the tenants' table of the ledger",
            "log lines that are no events of Headrace, and tracebacks",
        ],
    }


def _collect_files(parts: Parts, rules: Rules, file: Path | None, values: Sequence[Path], logs: Sequence[Path]) -> None:
    """Collect the parts from this machine: its description, the configuration, the chart's values and the logs."""
    parts.document("machine.json", sources.machine)
    if file is None:
        parts.left_out[CONFIGURATION] = "no configuration is known here: give it with -f"
    else:
        parts.document(CONFIGURATION, lambda: sources.configuration(file, rules))
        parts.document("configuration-check.json", lambda: sources.problems(file))
    for at, each in enumerate(values):
        parts.document(f"chart-values-{at}.json", partial(sources.configuration, each, rules))
    if not values:
        parts.left_out["chart-values"] = "none were given: `helm get values RELEASE > values.yaml`, then --values"
    if not logs:
        parts.left_out["events"] = "no log is known here: `kubectl logs POD > pod.log`, then --log"
    for at, each in enumerate(logs):
        name = f"events-{at}-{each.stem}.json"
        parts.document(name, partial(sources.events, each, partial(parts.left_out.__setitem__, f"{name}, a part")))


def _collect_state(parts: Parts, access: Access) -> None:
    """Collect the parts that a gateway's admin API returns."""
    with closing(Admin(access)) as api:
        gateway = sources.GatewaySource(api, access, parts)
        catalog = parts.document(CATALOG, gateway.catalog)
        if catalog is None:
            reason = parts.left_out[CATALOG]
            parts.left_out |= dict.fromkeys(("workers.json", OVERVIEW, "scaling.json", "routing.json"), reason)
            return
        parts.document("workers.json", gateway.workers)
        overview = parts.document(OVERVIEW, gateway.overview)
        parts.document("scaling.json", lambda: gateway.scaling([model["name"] for model in catalog["models"]]))
        calls = [str(call.get("id")) for call in (overview or {}).get("calls", ()) if isinstance(call, Mapping)]
        parts.document("routing.json", lambda: gateway.routing(calls))


def _collect_metrics(parts: Parts, addresses: Iterable[str]) -> None:
    """Collect the metrics page of each address. An address that occurs twice is read once."""
    names = list(dict.fromkeys(addresses))
    for at, address in enumerate(names):
        parts.text(f"metrics-{at}.prom", partial(_page, parts, address))
    if not names:
        parts.left_out["metrics"] = "no metrics address is known here: give it with --metrics host:port"


def _page(parts: Parts, address: str) -> str:
    return f"# {address}\n" + sources.metrics_page(address, parts.seconds_left(sources.PAGE_S))


def _metrics_addresses(given: Sequence[str], run: RunFolder | None, config: Any) -> list[str]:
    """Return the addresses of metrics pages: the given addresses, and those of the gateways of the local cluster.

    If no address is given and no local cluster is up, return the metrics address in the configuration. The address of a
    controller is included only if it is given.
    """
    if run is not None:
        return [*given, *(each["metrics"] for each in (run.endpoints(), *run.siblings()) if each.get("metrics"))]
    gateway = config.get("gateway") if isinstance(config, Mapping) else None
    listen = gateway.get("listen") if isinstance(gateway, Mapping) else None
    address = listen.get("metrics") if isinstance(listen, Mapping) else None
    return [*given, address] if isinstance(address, str) and not given else list(given)


def _logs(run: RunFolder | None) -> list[Path]:
    return [] if run is None else sorted(run.path.glob("*.log"))


def _tenants(parts: Parts) -> set[str]:
    """Return the names of tenants that occur in the parts."""
    names = {name for document in parts.documents.values() for name in tenant_names(document)}
    names |= {name for text in parts.texts.values() for name in tenant_labels(text)}
    return names - {"default", ""}
