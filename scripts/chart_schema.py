"""Write the generated files of the chart. With `--check`, only compare the files.

- helm/values.schema.json gets the output of `headrace config schema` as the schema of the key `config`.
- cluster/cli/chart_values.json gets a part of helm/values.yaml. `headrace config check` merges an operator's values
  into this part.
- helm/values.yaml gets the descriptions in helm/values.schema.json as comments; helm/README.md gets them as a table.
- deploy/alerts gets the chart's rules for Prometheus with the default values, deploy/monitoring the routes of these
  alerts for Alertmanager.
"""

from __future__ import annotations

import json
import re
import sys
import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from cluster.config.descriptions import config_schema

ROOT = Path(__file__).resolve().parent.parent
SCHEMA = ROOT / "helm" / "values.schema.json"
VALUES, COPY = ROOT / "helm" / "values.yaml", ROOT / "cluster" / "cli" / "chart_values.json"
README = ROOT / "helm" / "README.md"
RULES, PLAIN_RULES = ROOT / "helm" / "files" / "alerts" / "headrace.yaml", ROOT / "deploy" / "alerts" / "headrace.yaml"
COMMAND = "PYTHONPATH=. .venv/bin/python scripts/chart_schema.py"
VALUES_HEADER = f"""\
# Values of the chart. The comments are the descriptions in values.schema.json, which refuses unknown keys; change them
# there and run `{COMMAND}`. docs/kubernetes.md has the whole picture.
"""
CONFIG = "cluster.yaml, verbatim. docs/reference/configuration.md describes every key, deploy/example.yaml shows them."
TABLE_HEADING = "## Values"
RULES_HEADER = f"""\
# Rules for Prometheus without Helm: helm/files/alerts/headrace.yaml with the chart's default values, for a cluster with
# the name headrace. Replace the name, the namespace and the limits by yours. `{COMMAND}` writes this file.
"""
ALERTMANAGER = ROOT / "deploy" / "monitoring" / "alertmanager.yaml"
ALERTMANAGER_HEADER = f"""\
# Alertmanager routes for helm/files/alerts: `severity` page, ticket, info. Fill in the receivers. An alert mutes only
# others of its own cluster. `{COMMAND}` writes this file.
"""
MUTED_BY = {"HeadraceGatewaysGone": ("headrace_cluster",), "HeadraceModelWithoutWorkers": ("headrace_cluster", "model")}
"""Alerts beside which other alerts with the same values of these labels say nothing new: all others of a cluster
without gateways, and those about the calls of a model without workers."""
CALL_ALERTS = re.compile("Headrace(Error|Latency)Budget.*|HeadraceFewerReplicas")
WIDTH = 120


def with_config(chart: dict[str, Any], config: dict[str, Any]) -> dict[str, Any]:
    """Return the chart's schema, with the schema of cluster.yaml inserted as `config`."""
    config = dict(config)
    definitions = config.pop("$defs", {})
    own = {name: value for name, value in chart["$defs"].items() if not name.startswith("Config.")}
    renamed = json.loads(
        json.dumps(
            {"config": config, "defs": {f"Config.{name}": value for name, value in definitions.items()}}
        ).replace('"#/$defs/', '"#/$defs/Config.')
    )
    described = {**renamed["config"], "description": CONFIG}
    return {
        **chart,
        "properties": {**chart["properties"], "config": described},
        "$defs": {**own, **renamed["defs"]},
    }


def checked_part(values: dict[str, Any]) -> dict[str, Any]:
    """Return the part of the chart's values that `config check` reads: the configuration and the worker groups."""
    return {"config": values["config"], "ray": {"clusters": values["ray"]["clusters"]}}


def resolved(node: Mapping[str, Any], schema: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a schema node with its `$ref` replaced by the definition. The node's own description is kept."""
    if "$ref" not in node:
        return node
    return {**resolved(schema["$defs"][node["$ref"].rsplit("/", 1)[1]], schema), **node}


def is_leaf(name: str, node: Mapping[str, Any]) -> bool:
    """Return whether the chart's documentation lists a value as a whole, without the keys below it. This is true for
    values without keys, and for `config` and pod templates, which are described elsewhere."""
    return name in ("config", "podTemplate") or not (node.get("properties") or node.get("items", {}).get("properties"))


def commented_values(schema: Mapping[str, Any], values: Mapping[str, Any], text: str) -> str:
    """Return a new text of helm/values.yaml, with the given `values` and with comments from the schema. `text`: the
    present text of the file.

    The section `config` is copied from `text` unchanged, because docs/reference/configuration.md describes its fields.
    """
    config = re.search(r"^config:\n(?:[ ].*\n)*", text, re.MULTILINE)
    assert config is not None, "values.yaml has no config"
    lines = []
    for name, node in schema["properties"].items():
        lines += ["", *comment(node["description"], 0)]
        lines += config[0].splitlines() if name == "config" else described(name, node, values[name], schema, 0)
    return VALUES_HEADER + "\n".join(lines) + "\n"


def comment(text: str, indent: int) -> list[str]:
    """Return a text as the lines of a YAML comment."""
    return [" " * indent + "# " + line for line in textwrap.wrap(text, WIDTH - indent - 2, break_on_hyphens=False)]


def described(name: str, node: Mapping[str, Any], value: Any, schema: Mapping[str, Any], indent: int) -> list[str]:
    """Return the lines for one key and its value in helm/values.yaml. Each key inside the value is preceded by its
    comment."""
    node, space = resolved(node, schema), " " * indent
    if not value or is_leaf(name, {**node, "items": resolved(node.get("items", {}), schema)}):
        return [f"{space}{name}: {flow(value)}"]
    lines = [f"{space}{name}:"]
    if isinstance(value, dict):
        return lines + described_keys(node, value, schema, indent + 2)
    for item in value:
        inner = described_keys(resolved(node["items"], schema), item, schema, indent + 4)
        first = next(at for at, line in enumerate(inner) if not line.lstrip().startswith("#"))
        inner[first] = inner[first][: indent + 2] + "- " + inner[first].lstrip()
        lines += inner
    return lines


def described_keys(
    node: Mapping[str, Any], value: Mapping[str, Any], schema: Mapping[str, Any], indent: int
) -> list[str]:
    """Return the lines of a section's keys in helm/values.yaml. A key without a default is written as a comment."""
    lines: list[str] = []
    for key, inner in node["properties"].items():
        lines += comment(inner["description"], indent)
        lines += described(key, inner, value[key], schema, indent) if key in value else [" " * indent + f"# {key}:"]
    return lines


def flow(value: Any) -> str:
    """Return a value as YAML on one line (flow style)."""
    if value == "":
        return '""'
    return yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=10**6).removesuffix("...\n").strip()


def rows(
    node: Mapping[str, Any], value: Any, schema: Mapping[str, Any], prefix: str = ""
) -> Iterator[tuple[str, str, str, str]]:
    """Yield (key, type, default, description) for every value below a section of the schema."""
    for name, raw in node["properties"].items():
        inner, path = resolved(raw, schema), prefix + name
        default = value.get(name) if isinstance(value, dict) else None
        items = resolved(inner.get("items", {}), schema)
        below = inner if "properties" in inner else items
        leaf = is_leaf(name, {**inner, "items": items})
        shown = f"`{flow(default)}`" if default is not None and (leaf or not default) and name != "config" else ""
        yield path, kind(inner), shown, inner["description"]
        if not leaf:
            first = default[0] if isinstance(default, list) and default else default
            yield from rows(below, first, schema, path + ("." if below is inner else "[]."))


def kind(node: Mapping[str, Any]) -> str:
    """Return the type of a value in words, from the value's schema node."""
    if "enum" in node:
        return " or ".join(f"`{item}`" for item in node["enum"])
    words = {"object": "map", "array": "list"}
    kinds = node.get("type", "object")
    return " or ".join(words.get(item, item) for item in ([kinds] if isinstance(kinds, str) else kinds))


def with_table(readme: str, schema: Mapping[str, Any], values: Mapping[str, Any]) -> str:
    """Return the text of the chart's README, with a new table of values below its heading."""
    table = [f"| `{key}` | {kind} | {default} | {text} |" for key, kind, default, text in rows(schema, values, schema)]
    head = readme.split(TABLE_HEADING)[0]
    note = f"Generated from values.schema.json and values.yaml by `{COMMAND}`."
    columns = ["| key | type | default | description |", "| --- | --- | --- | --- |"]
    return "\n".join([f"{head}{TABLE_HEADING}\n", note, "", *columns, *table]) + "\n"


def plain_rules(rules: str, values: Mapping[str, Any]) -> str:
    """Replace `${...}` in the rules by values, as helm/templates/rules.yaml does at the installation of the chart."""
    name = values["fullnameOverride"]
    known = {**values["monitoring"]["alerts"], "cluster": values["config"]["name"], "namespace": name, "name": name}
    for key, value in known.items():
        rules = rules.replace(f"${{{key}}}", value if isinstance(value, str) else json.dumps(value))
    return RULES_HEADER + rules[rules.index("groups:") :]


def alertmanager(rules: str) -> str:
    """Return a configuration of Alertmanager for the alerts in `rules`."""
    names = re.findall(r"- alert: (\w+)", rules)
    inhibitions = []
    for source, labels in MUTED_BY.items():
        targets = [name for name in names if name != source and ("model" not in labels or CALL_ALERTS.fullmatch(name))]
        inhibitions.append(
            {
                "source_matchers": [f'alertname="{source}"'],
                "target_matchers": [f'alertname=~"{"|".join(targets)}"'],
                "equal": list(labels),
            }
        )
    routes: list[dict[str, Any]] = [
        {"receiver": "pager", "matchers": ['severity="page"'], "repeat_interval": "1h"},
        {"receiver": "nobody", "matchers": ['severity="info"']},
    ]
    config = {
        "route": {
            "receiver": "tickets",
            "group_by": ["headrace_cluster", "namespace", "alertname", "model", "kind"],
            "group_wait": "30s",
            "group_interval": "5m",
            "repeat_interval": "12h",
            "routes": routes,
        },
        "inhibit_rules": inhibitions,
        "receivers": [{"name": name} for name in ("pager", "tickets", "nobody")],
    }
    return ALERTMANAGER_HEADER + yaml.safe_dump(config, sort_keys=False, width=WIDTH)


def generated() -> dict[Path, str]:
    """Return the text that every generated file should have."""
    schema = with_config(json.loads(SCHEMA.read_text()), config_schema())
    text = VALUES.read_text()
    text = commented_values(schema, yaml.safe_load(text), text)
    values = yaml.safe_load(text)
    return {
        SCHEMA: json.dumps(schema, indent=1) + "\n",
        VALUES: text,
        README: with_table(README.read_text(), schema, values),
        COPY: json.dumps(checked_part(values), indent=1) + "\n",
        PLAIN_RULES: plain_rules(RULES.read_text(), values),
        ALERTMANAGER: alertmanager(RULES.read_text()),
    }


def main(arguments: list[str]) -> int:
    """Write all files. With --check, only compare the files.

    Returns the exit code: 0 if all files are up to date.
    """
    stale = [(path, text) for path, text in generated().items() if not path.exists() or path.read_text() != text]
    for path, text in stale:
        if "--check" in arguments:
            print(f"{path} is not up to date: run {COMMAND}", file=sys.stderr)
        else:
            path.write_text(text)
    return int("--check" in arguments and bool(stale))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
