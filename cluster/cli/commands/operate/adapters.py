"""Commands for adapters (LoRA): check an adapter's files against its base model; load, unload and list adapters.

The controller executes the changes. `list` shows the state of an adapter on the workers that are linked to the gateway.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from cluster.admin.v1 import adapters_pb2 as pb
from cluster.api.adapters import OTHER_FILES
from cluster.cli.commands.operate.scale import AnyModelArgument, ModelArgument, ReasonOption
from cluster.cli.common import USAGE, JsonOption, fail, out, print_json
from cluster.cli.confirmation import YesOption, confirm
from cluster.cli.target.admin_client import PAGE_SIZE, Admin, plain, with_admin

POLL_S = 0.5
DIGEST_SHOWN = 12

app = typer.Typer(no_args_is_help=True, help="Load, unload and list LoRA adapters of models.")
FolderArgument = Annotated[
    Path, typer.Argument(help="The adapter's folder, with adapter_config.json.", file_okay=False, show_default=False)
]
ModelOption = Annotated[
    Path,
    typer.Option(
        "--model",
        help="The base model's folder, with its .safetensors files; only their headers are read.",
        file_okay=False,
        show_default=False,
    ),
]
RankOption = Annotated[int, typer.Option("--max-lora-rank", help="The engine's max_lora_rank.", min=1, max=512)]


@app.command("check")
def check(
    folder: FolderArgument, model: ModelOption, max_lora_rank: RankOption = 64, as_json: JsonOption = False
) -> None:
    """Check an adapter's files against its base model. A worker runs the same checks before it loads the files. Prints
    the digest, the rank and the size."""
    from cluster.worker.weights.adapter import AdapterError, base_shapes, check_adapter

    try:
        checked = check_adapter(folder, base_shapes(model), max_lora_rank)
    except AdapterError as error:
        fail(str(error), USAGE)
    if as_json:
        print_json(
            {
                "digest": checked.digest,
                "rank": checked.rank,
                "layers": checked.modules,
                "size_bytes": checked.size_bytes,
            }
        )
        return
    out.print(
        f"{folder}: valid; rank {checked.rank}, {checked.modules} layers, {checked.size_bytes} bytes, digest\n"
        f"{checked.digest}",
        markup=False,
        soft_wrap=True,
    )


NameArgument = Annotated[
    str, typer.Argument(metavar="NAME", help="The adapter's name; callers use MODEL:NAME.", show_default=False)
]


@with_admin
def load(
    api: Admin,
    model: ModelArgument,
    name: NameArgument,
    source: Annotated[
        str,
        typer.Argument(metavar="SOURCE", help="A folder, hf://org/name, s3://, gs:// or https://.", show_default=False),
    ],
    digest: Annotated[
        str, typer.Option("--digest", help="Refuse files with another digest: 64 hex digits, as `check` prints them.")
    ] = "",
    tenant: Annotated[
        list[str] | None,
        typer.Option("--tenant", help="Only this tenant may use it; repeatable.", show_default=False),
    ] = None,
    pinned: Annotated[bool, typer.Option("--pinned", help="Never drop it from memory for another one.")] = False,
    license_name: Annotated[str, typer.Option("--license", help="Its license, for the record.")] = "",
    version: Annotated[str, typer.Option("--version", help="The model's version to which it belongs.")] = "",
    wait: Annotated[bool, typer.Option("--wait", help="Wait until all workers have loaded it.")] = False,
    timeout_s: Annotated[float, typer.Option("--timeout-s", help="Seconds to wait.", min=0.0)] = 300.0,
    reason: ReasonOption = "",
    as_json: JsonOption = False,
) -> None:
    """Load an adapter while the model's workers serve. It is kept until `unload`, and replaces an adapter of the same
    name that was loaded before. With --wait, the exit code is 1 if a worker cannot load it."""
    folder = Path(source)
    request = pb.LoadAdapterRequest(
        name=model,
        adapter=name,
        source=str(folder.resolve()) if "://" not in source and folder.is_dir() else source,
        digest=digest.removeprefix("sha256:"),
        tenants=tenant or (),
        pinned=pinned,
        license=license_name,
        version=version,
        reason=reason,
    )
    adapter = api.ask("catalog", "LoadAdapter", request).adapter
    if wait:
        adapter = _wait(api, adapter, timeout_s)
    _show([adapter], as_json)
    if wait and (adapter.failures or adapter.ready_workers < adapter.workers or not adapter.workers):
        raise typer.Exit(1)


def _wait(api: Admin, wanted: pb.Adapter, timeout_s: float) -> pb.Adapter:
    """Wait, at most `timeout_s`, until each worker has loaded the adapter or failed. Returns the adapter's state.

    States of an earlier load do not count and, if `wanted` has a digest, neither do states of an adapter with another
    digest. `wanted` itself is returned if no state of it is known at the end.
    """
    until = time.monotonic() + timeout_s
    while True:
        found = next((one for one in _adapters(api, wanted.model) if _is_same(one, wanted)), wanted)
        undecided = [f for f in found.failures if wanted.digest and f.reason.startswith(OTHER_FILES)]
        decided = found.ready_workers + len(found.failures) - len(undecided)
        if (found.workers > 0 and decided >= found.workers) or time.monotonic() >= until:
            return found
        time.sleep(POLL_S)


def _is_same(shown: pb.Adapter, wanted: pb.Adapter) -> bool:
    """Return whether a listed adapter is the wanted one: it has the same name and source, the same load number unless
    the gateway's release shows none, and the wanted digest if there is one."""
    if shown.load_number not in (0, wanted.load_number):
        return False
    return (shown.name, shown.source) == (wanted.name, wanted.source) and wanted.digest in ("", shown.digest)


@with_admin
def unload(
    api: Admin,
    model: ModelArgument,
    name: NameArgument,
    reason: ReasonOption = "",
    yes: YesOption = False,
    as_json: JsonOption = False,
) -> None:
    """Unload an adapter that `load` has loaded. Running calls finish; new calls for it are refused."""
    confirm(f"Unload {model}:{name} at {api.where}?", yes)
    request = pb.UnloadAdapterRequest(name=model, adapter=name, reason=reason)
    adapter = api.ask("catalog", "UnloadAdapter", request).adapter
    if as_json:
        print_json(plain(adapter))
        return
    out.print(f"unloaded: {adapter.model}:{adapter.name}", markup=False)


@with_admin
def list_adapters(api: Admin, model: AnyModelArgument = "", as_json: JsonOption = False) -> None:
    """List the adapters with their state on the workers of this gateway."""
    _show(_adapters(api, model), as_json)


app.command("load")(load)
app.command("unload")(unload)
app.command("list")(list_adapters)


def _adapters(api: Admin, model: str) -> list[pb.Adapter]:
    adapters, token = list[pb.Adapter](), ""
    while True:
        request = pb.ListAdaptersRequest(name=model, page_size=PAGE_SIZE, page_token=token)
        page = api.ask("catalog", "ListAdapters", request)
        adapters += page.adapters
        if not (token := page.next_page_token):
            return adapters


def _show(adapters: Sequence[pb.Adapter], as_json: bool) -> None:
    if as_json:
        print_json([plain(adapter) for adapter in adapters])
        return
    if not adapters:
        out.print("there are no adapters", markup=False)
        return
    table = Table("model", "adapter", "state", "workers", "digest", "tenants", "why", box=None, pad_edge=False)
    for one in adapters:
        workers = f"{one.ready_workers} of {one.workers}" if one.state else ""
        tenants = ", ".join(one.tenants) or "all"
        cells = (one.model, one.name, one.state, workers, one.digest[:DIGEST_SHOWN], tenants, one.reason)
        table.add_row(*map(escape, cells))
    out.print(table)
