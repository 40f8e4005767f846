"""Write the pages in docs/reference/ from the code of configuration, metrics, log events, errors and commands.

With `--check`, the script only compares the pages with the code.
"""

from __future__ import annotations

import inspect
import json
import sys
import textwrap
import types
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import typer
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from cluster.api.outcomes import OUTCOME_STATUS, Outcome
from cluster.cli.all_commands import app
from cluster.config.descriptions import attribute_docstrings
from cluster.config.schema import Config
from cluster.config.tenants import Tenant, TenantDefaults
from cluster.observe.definitions import DEFINITIONS, ENGINE_DEFINITIONS, ENGINE_HISTOGRAMS, Definition
from cluster.observe.events import EVENTS
from cluster.policy.problems import ANY_ALERT, KINDS
from scripts.log_events import MORE, logged_events

FOLDER = Path(__file__).resolve().parent.parent / "docs" / "reference"
COMMAND = "make reference"
PLAIN = {bool: "boolean", int: "integer", float: "number", str: "string", Path: "path", Any: "any value"}
BOUNDS = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table with a head row and further rows."""
    escaped = ([" ".join(cell.replace("|", "\\|").split()) for cell in row] for row in rows)
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *escaped))


def wrapped(text: str) -> str:
    """Return a text as one paragraph with lines of at most 120 characters."""
    return textwrap.fill(" ".join(text.split()), 120, break_long_words=False, break_on_hyphens=False)


def page(title: str, introduction: str, source: str, *parts: str) -> str:
    """Return the Markdown text of a page: title, introduction, a line that names the source code, and the parts."""
    origin = f"`{COMMAND}` writes this page from `{source}`."
    return "\n\n".join((f"# {title}", wrapped(introduction), origin, *parts)) + "\n"


def section_in(hint: Any) -> type[BaseModel] | None:
    """Return the class of the configuration section in a type hint; None if the hint contains no section."""
    if isinstance(hint, type) and issubclass(hint, BaseModel):
        return hint
    return next(filter(None, map(section_in, typing.get_args(hint))), None)


def type_name(hint: Any) -> str:
    """Describe a type hint in terms of YAML. The `None` of an optional value is left out."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Annotated:
        return type_name(arguments[0])
    if origin is typing.Literal:
        return " or ".join(f"`{value}`" for value in arguments)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(type_name(argument) for argument in arguments if argument is not types.NoneType)
    if origin is not None:
        return f"list of {type_name(arguments[0])}s" if origin is tuple else f"map of {type_name(arguments[1])}s"
    return PLAIN.get(hint, "section")


def constraints(hint: Any, metadata: Iterable[Any]) -> Iterator[Any]:
    """Yield every constraint of a value. For a list or a map, also yield the constraints of the contained values."""
    for item in metadata:
        yield from constraints(None, item.metadata) if isinstance(item, FieldInfo) else (item,)
    for argument in typing.get_args(hint):
        yield from constraints(argument, getattr(argument, "__metadata__", ()))


def allowed_range(field: FieldInfo) -> str:
    """Describe the allowed range of a configuration key. The text is empty if there is no range."""
    every = [*constraints(field.annotation, field.metadata)]
    found = {name: getattr(item, name) for name in BOUNDS for item in every if getattr(item, name, None) is not None}
    if found.keys() == {"ge", "le"}:
        return f"{found['ge']} to {found['le']}"
    return ", ".join(f"{BOUNDS[name]} {bound}" for name, bound in found.items())


def default_value(field: FieldInfo) -> str:
    """Return the default value of a configuration key as YAML.

    The text is empty for a section, because the keys of a section have their own defaults.
    """
    value = None if field.is_required() else field.get_default(call_default_factory=True)
    if value is None or isinstance(value, BaseModel):
        return "required" if field.is_required() else "none" if value is None else ""
    return f"`{json.dumps(value, default=lambda item: item.model_dump(by_alias=True))}`"


def keys(section: type[BaseModel], path: str = "") -> Iterator[tuple[str, ...]]:
    """Yield a row for each key of a section and of the sections inside the section.

    For the section of a tenant, the keys of tenant_defaults are left out.
    """
    descriptions = attribute_docstrings(section)
    for name, field in section.model_fields.items():
        if section is Tenant and name in TenantDefaults.model_fields:
            continue
        key, inner, kind = path + (field.alias or name), section_in(field.annotation), type_name(field.annotation)
        text = f"{inspect.getdoc(inner) if inner else ''} {descriptions.get(name, '')}".strip()
        yield key, kind, default_value(field), allowed_range(field), text
        if inner:
            yield from keys(inner, f"{key}[]." if "list of" in kind else f"{key}.")


def configuration() -> str:
    """Return the page about the configuration keys."""
    head, groups = ("key", "type", "default", "range", "description"), dict[str, list[Sequence[str]]]()
    for key, kind, *rest in sorted(keys(Config)):
        top = key.split(".")[0].removesuffix("[]") if "." in key or "section" in kind else "Top level"
        groups.setdefault(top, []).append((f"`{key}`", kind, *rest))
    introduction = (
        "Every key of cluster.yaml, for operators who write the file. `[]` stands for an entry of a list. A tenant in "
        "`tenants` also has the keys of `tenant_defaults`, whose values hold where the tenant sets none. "
        "[deploy/example.yaml](../../deploy/example.yaml) is a complete file; `headrace config check FILE` checks one."
    )
    parts = (f"## {top}\n\n{table(head, rows)}" for top, rows in groups.items())
    return page("Configuration keys", introduction, "cluster/config", *parts)


def metric_rows(definitions: Mapping[str, Definition], prefix: str = "") -> Iterator[Sequence[str]]:
    """Yield a row for each metric, sorted by name."""
    for name, metric in sorted(definitions.items()):
        yield f"`{prefix}{name}`", metric.kind, ", ".join(f"`{label}`" for label in metric.labels), metric.help


def metrics() -> str:
    """Return the page about the metrics."""
    introduction = (
        "The Prometheus metrics, for operators who write queries and alerts. Each also has the label "
        "`headrace_cluster`, the cluster's `name`. Tenants beyond `observe.max_tenant_series` share the value `other` "
        "of the label `tenant`. [observability.md](../observability.md) says which process exports what."
    )
    head = ("metric", "type", "labels", "meaning")
    engine = (
        "vLLM's series under vLLM's names, from what each worker reports to its gateways. Every gateway exports them "
        "for its own workers, so a query over several gateways takes `max by (worker)` before it sums."
    )
    histograms = (
        "These histograms of vLLM's front end are measured by the gateway. Each is the same as the metric beside it, "
        "with the label `model_name` for `model`."
    )
    process = (
        "Gateways and controllers also export Prometheus' usual metrics of a process, without `headrace_cluster`: "
        "`process_cpu_seconds_total`, `process_resident_memory_bytes`, `process_virtual_memory_bytes`, "
        "`process_open_fds`, `process_max_fds`, `process_start_time_seconds`, `python_gc_collections_total`, "
        "`python_gc_objects_collected_total`, `python_gc_objects_uncollectable_total`."
    )
    same = [(f"`{name}`", f"`headrace_{ours}`") for name, ours in sorted(ENGINE_HISTOGRAMS.items())]
    return page(
        "Metrics",
        introduction,
        "cluster/observe/definitions.py",
        table(head, metric_rows(DEFINITIONS, "headrace_")),
        f"## vLLM\n\n{wrapped(engine)}\n\n{table(head, metric_rows(ENGINE_DEFINITIONS))}",
        f"{wrapped(histograms)}\n\n{table(('vLLM', 'Headrace'), same)}",
        f"## Process\n\n{wrapped(process)}",
    )


def events() -> str:
    """Return the page about the log events."""
    levels: dict[str, dict[str, None]] = {}
    fields: dict[str, dict[str, None]] = {}
    for event in logged_events():
        if event.name is not None:
            levels.setdefault(event.name, {})[event.level] = None
            fields.setdefault(event.name, {}).update(dict.fromkeys(event.fields))
    rows = []
    for name, meaning in sorted(EVENTS.items()):
        more = fields[name].pop(MORE, 1) is None
        names = ", ".join([*(f"`{field}`" for field in fields[name]), *([MORE] if more else ())])
        rows.append((f"`{name}`", ", ".join(levels[name]), meaning, names))
    introduction = (
        "Every event in the logs, for operators who search them and write rules for them. A line is a JSON object "
        "with `timestamp`, `level`, `event` and the fields of the event; each also has `cluster` and `part` "
        "(`gateway`, `controller`, `worker`), a worker's also `worker`, `pod`, `node` and `gpu`. An event has not "
        "always all of its fields. `exception` is a traceback; `trace_id` is there if the call has a trace."
    )
    return page(
        "Log events", introduction, "cluster/observe/events.py", table(("event", "level", "meaning", "fields"), rows)
    )


def errors() -> str:
    """Return the page about the errors."""
    descriptions, rows = attribute_docstrings(Outcome), []
    for outcome in sorted(set(Outcome) - {Outcome.OK}, key=lambda outcome: outcome.name):
        status, (meaning, _, remedy) = OUTCOME_STATUS[outcome], descriptions[outcome.name].partition(". ")
        retry = "no" if status.retry_after_s is None else f"after {status.retry_after_s:g} s"
        rows.append((f"`{outcome.name}`", f"`{status.grpc}`", str(status.http), retry, f"{meaning}.", remedy))
    introduction = (
        "Every reason with which a call fails, for developers of clients. Over gRPC it is in `ErrorInfo` and the delay "
        "of a retry in `RetryInfo`, over HTTP in `error.code` (in lower case) and `Retry-After`. Delays are defaults."
    )
    head = ("reason", "gRPC status", "HTTP", "retry", "meaning", "what to do")
    return page("Errors", introduction, "cluster/api/outcomes.py", table(head, rows))


def commands(command: Any, path: str) -> Iterator[str]:
    """Yield the part of the page about a command, and the parts about the command's subcommands."""
    context = command.make_context(path, [], resilient_parsing=True)
    records = [record for parameter in command.params if (record := parameter.get_help_record(context))]
    options = sorted((r for r in records if r[0].startswith("-")), key=lambda record: record[0].lstrip("-"))
    rows = [(f"`{name}`", text) for name, text in (*(r for r in records if r not in options), *options)]
    parts = [f"## {path}", *map(wrapped, (command.help or "").split("\n\n"))]
    yield "\n\n".join([*parts, table(("argument or option", "meaning"), rows)] if rows else parts)
    for name, inner in sorted(getattr(command, "commands", {}).items()):
        if not inner.hidden:
            yield from commands(inner, f"{path} {name}")


def cli() -> str:
    """Return the page about the commands."""
    introduction = f"Every command with its options, for operators; `--help` prints the same. {app.info.epilog}"
    return page("Commands", introduction, "cluster/cli", *commands(typer.main.get_command(app), "headrace"))


def problems() -> str:
    """Return the page about the problems that a cluster lists."""
    rows = [
        (f"`{name}`", kind.hurts.value, kind.summary.format(object="*object*"), kind.remedy, kind.alert or ANY_ALERT)
        for name, kind in KINDS.items()
    ]
    introduction = (
        "Every kind of problem that `headrace status`, `headrace top`, the console and the metric `headrace_problem` "
        "list while it lasts, for operators. `headrace status` ends with exit code 4 while one hurts callers. Each "
        "raises an alert, whose page in docs/runbooks says more."
    )
    head = ("kind", "hurts", "problem", "what to do first", "alert")
    return page("Problems", introduction, "cluster/policy/problems.py", table(head, rows))


PAGES = {
    "cli": cli,
    "configuration": configuration,
    "errors": errors,
    "events": events,
    "metrics": metrics,
    "problems": problems,
}


def main(arguments: Sequence[str], folder: Path = FOLDER) -> int:
    """Write the pages. With --check, only compare the pages. Returns the exit code: 0 if all pages are up to date."""
    texts = {folder / f"{name}.md": write() for name, write in PAGES.items()}
    stale = [file for file, text in texts.items() if not file.exists() or file.read_text() != text]
    for file in stale:
        if "--check" in arguments:
            print(f"{file}: differs from the code; run `{COMMAND}`", file=sys.stderr)
        else:
            file.write_text(texts[file])
    return int("--check" in arguments and bool(stale))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
