"""The commands `apply` and `diff`, and the subcommands of `models` that control which versions of a model get calls.

The controller executes the changes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from cluster.admin.v1 import catalog_pb2 as pb
from cluster.cli.commands.operate.scale import ModelArgument, ReasonOption
from cluster.cli.commands.operate.status import sampling_text
from cluster.cli.common import DIFFERS, USAGE, FileOption, JsonOption, err, fail, out, print_json, read_config
from cluster.cli.config_inputs import cluster_yaml_data
from cluster.cli.confirmation import YesOption, confirm, is_asked
from cluster.cli.target.admin_client import Admin, plain, with_admin
from cluster.config.yaml_reader import NotYaml, load_documents
from cluster.policy.catalog.layers import merge_layers

FilesOption = Annotated[
    list[Path],
    typer.Option(
        "-f", "--file", help="A cluster.yaml, chart values, or a folder of them; repeatable: later override earlier.",
        exists=True, show_default=False,
    ),
]  # fmt: skip
PruneOption = Annotated[
    bool,
    typer.Option(
        "--prune",
        help="Include models that run and are not in the files: `apply` removes them, `diff` shows their removal.",
    ),
]


def read_layers(paths: Sequence[Path]) -> tuple[list[list[Mapping[str, Any]]], list[str]]:
    """Read the models of YAML files. Each file is a cluster.yaml or values of the chart. The files of a folder are read
    in the order of their names.

    Returns one list of models per YAML document, and the other top-level keys of the files. An invalid file ends the
    command with exit code 2.
    """
    layers: list[list[Mapping[str, Any]]] = []
    others: set[str] = set()
    for path in [file for given in paths for file in _yaml_files(given)]:
        try:
            documents = load_documents(path.read_text())
        except (OSError, UnicodeDecodeError, NotYaml) as error:
            fail(f"{path}: cannot be read: {error}", USAGE)
        for document in map(cluster_yaml_data, documents):
            if document is None:
                continue
            models = document.get("models", []) if isinstance(document, dict) else None
            if not isinstance(models, list):
                fail(f"{path}: expected a mapping whose `models` is a list", USAGE)
            if "models" in document:
                layers.append(models)
            others |= set(document) - {"models", "api_version", "name"}
    return layers, sorted(others)


def _yaml_files(path: Path) -> Sequence[Path]:
    if not path.is_dir():
        return [path]
    files = sorted(file for pattern in ("*.yaml", "*.yml") for file in path.glob(pattern))
    return files or fail(f"{path}: the folder has no .yaml or .yml files", USAGE)


def _document(files: Sequence[Path]) -> bytes:
    """Merge the models of the files, and return the JSON document that the admin API accepts."""
    layers, others = read_layers(files)
    if not layers:
        fail(f"{', '.join(map(str, files))}: no file has the key `models`", USAGE)
    if others:
        names = escape(", ".join(others))
        err.print(f"[yellow]note:[/yellow] only models are applied; these take effect at a process start: {names}")
    try:
        return json.dumps({"models": merge_layers(layers)}).encode()
    except (ValueError, TypeError) as error:
        fail(str(error), USAGE)


@with_admin
def apply(
    api: Admin,
    files: FilesOption,
    prune: PruneOption = False,
    validate_only: Annotated[bool, typer.Option("--validate-only", help="Only show what would change.")] = False,
    reason: ReasonOption = "",
    yes: YesOption = False,
    as_json: JsonOption = False,
) -> None:
    """Add and change models to match the files. Everything is checked before anything changes; unchanged models are
    not touched. Models that are not in the files stay, unless --prune is given."""
    document = _document(files)
    if prune and not validate_only and is_asked(yes):
        removed = _removed_models(api, document)
        if removed:
            confirm(f"Remove {', '.join(removed)} from {api.where}?", yes)
    request = pb.ApplyRequest(document=document, prune=prune, validate_only=validate_only, reason=reason)
    answer = api.ask("catalog", "Apply", request)
    _show_changes(answer.changes, as_json, "would change" if validate_only else "applied")


def _removed_models(api: Admin, document: bytes) -> list[str]:
    """Return the models that `apply --prune` would remove."""
    answer = api.ask("catalog", "Diff", pb.DiffRequest(document=document, prune=True))
    return [change.model for change in answer.changes if change.kind == "remove"]


@with_admin
def diff(api: Admin, files: FilesOption, prune: PruneOption = False, as_json: JsonOption = False) -> None:
    """Show what `apply` would change. Exit code 0: no changes; 4: changes."""
    request = pb.DiffRequest(document=_document(files), prune=prune)
    answer = api.ask("catalog", "Diff", request)
    _show_changes(answer.changes, as_json, "differs")
    if answer.changes:
        raise typer.Exit(DIFFERS)


@with_admin
def promote(api: Admin, model: ModelArgument, reason: ReasonOption = "", as_json: JsonOption = False) -> None:
    """Make the canary the model's only version. Its replicas stay; the replicas of the other version finish their calls
    and end."""
    request = pb.PromoteRequest(name=model, reason=reason)
    _show_versions(api.ask("catalog", "Promote", request), as_json)


@with_admin
def rollback(api: Admin, model: ModelArgument, reason: ReasonOption = "", as_json: JsonOption = False) -> None:
    """Stop new calls to the canary at once. It stays rolled back until its entry changes."""
    request = pb.RollbackRequest(name=model, reason=reason)
    _show_versions(api.ask("catalog", "Rollback", request), as_json)


@with_admin
def weigh(
    api: Admin,
    model: ModelArgument,
    version: Annotated[str, typer.Argument(metavar="VERSION", help="The canary, or the other version.")],
    weight: Annotated[
        float, typer.Argument(metavar="WEIGHT", help="The version's share of the calls.", min=0.0, max=1.0)
    ],
    reason: ReasonOption = "",
    as_json: JsonOption = False,
) -> None:
    """Set a version's share of its model's calls. The other version gets the rest. Undoes a rollback of the version."""
    request = pb.SetWeightsRequest(name=model, version=version, weight=weight, reason=reason)
    _show_versions(api.ask("catalog", "SetWeights", request), as_json)


@with_admin
def quarantine(
    api: Admin,
    model: ModelArgument,
    version: Annotated[
        str, typer.Argument(metavar="VERSION", help="A version of the model; for a worker see `drain`.")
    ],
    lift: Annotated[bool, typer.Option("--lift", help="End the quarantine.")] = False,
    reason: ReasonOption = "",
    as_json: JsonOption = False,
) -> None:
    """Stop new calls to a version, but keep its replicas. They can be inspected. Running streams move to a version with
    the same weights; without one they finish where they are."""
    request = pb.QuarantineRequest(name=model, version=version, lift=lift, reason=reason)
    _show_versions(api.ask("catalog", "Quarantine", request), as_json)


def pin(
    file: FileOption,
    models: Annotated[
        list[str] | None, typer.Argument(metavar="[MODEL]...", help="Models of the file; without any, all.")
    ] = None,
    check: Annotated[
        bool, typer.Option("--check", help=f"Write nothing; exit code {DIFFERS} if the file would change.")
    ] = False,
) -> None:
    """Write the digests of the models' weights into the file. Sources with revisions also get the key `revision`.
    Fetches missing weights. From then on, a replica with other weights is refused. The rest of the file stays
    unchanged."""
    from cluster.cli.commands.run.processes import source_rules
    from cluster.cli.pinning import set_keys
    from cluster.worker.weights.digests import weight_digest
    from cluster.worker.weights.sources import SourceError, resolve, revision_of

    config = read_config(file)
    rules = source_rules(config)
    known = {model.name: model for model in config.models}
    for name in models or ():
        if name not in known:
            fail(f"{file}: models: there is no entry {name!r}", USAGE)
    before = text = file.read_text()
    for name in models or known:
        spec = known[name].spec()
        if spec.source.startswith("sim://"):
            continue
        try:
            folder = resolve(spec, rules)
            pins = {"digest": weight_digest(folder, rules.cache_dir)}
            if revision := revision_of(spec, folder):
                pins["revision"] = revision
            text = set_keys(text, name, pins)
        except (SourceError, ValueError, OSError) as error:
            fail(f"{file}: models[{name}]: {error}")
        out.print(f"{name}: " + "  ".join(f"{key} {value}" for key, value in pins.items()), markup=False)
    if text == before:
        return
    if check:
        raise typer.Exit(DIFFERS)
    draft = file.with_name(file.name + ".new")
    draft.write_text(text)
    draft.replace(file)


@with_admin
def get(api: Admin, model: ModelArgument, as_json: JsonOption = False) -> None:
    """Show one model with its versions."""
    from cluster.admin.v1 import admin_pb2

    entry = api.ask("catalog", "Get", admin_pb2.GetRequest(name=model))
    if as_json:
        print_json(plain(entry) | {"card": dict(entry.card)})
        return
    details = {
        "name": entry.name, "aliases": ", ".join(entry.aliases), "state": entry.state, "why": entry.state_reason,
        "sampling": sampling_text(entry.default_sampling), "license": entry.license, "family": entry.family,
        "fallback": ", ".join(entry.fallback), "note": entry.note, **dict(entry.card),
    }  # fmt: skip
    table = Table(box=None, show_header=False, pad_edge=False)
    for key, value in details.items():
        if value:
            table.add_row(key, escape(str(value)))
    out.print(table)
    out.print(_version_table(entry.versions))


def _show_changes(changes: Sequence[pb.Change], as_json: bool, word: str) -> None:
    if as_json:
        print_json([plain(change) for change in changes])
        return
    signs = {"add": "+", "remove": "-"}
    for change in changes:
        out.print(f"{signs.get(change.kind, '~')} {change.model}", markup=False)
        for difference in change.differences:
            before, after = difference.before_json or "unset", difference.after_json or "unset"
            out.print(f"    {difference.path}: {before} -> {after}", markup=False)
        if change.restarts:
            out.print(f"    {change.restarts}", markup=False)
    count = len(changes)
    out.print(f"{word}: {count} model{'' if count == 1 else 's'}" if count else "nothing differs", markup=False)


def _show_versions(answer: pb.VersionsResponse, as_json: bool) -> None:
    if as_json:
        print_json(plain(answer))
        return
    out.print(_version_table(answer.versions))


def _version_table(versions: Sequence[pb.VersionStatus]) -> Table | str:
    if not versions:
        return "no versions are known yet"
    table = Table("version", "weight", "state", "replicas", "revision", "why", box=None, pad_edge=False)
    for status in versions:
        replicas = f"{status.replicas} of {status.replicas_desired}"
        weight = f"{status.weight:.0%}"
        cells = (status.version, weight, status.state, replicas, status.revision, status.state_reason)
        table.add_row(*map(escape, cells))
    return table
