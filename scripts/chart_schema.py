"""Keep chart and program equal: `config` in helm/values.schema.json is what `headrace config schema` prints, and the
program's chart_values.json is the part of helm/values.yaml over which `headrace config check` lays a file of values.
`--check` only says whether they are."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import yaml

from cluster.config.schema import Config

ROOT = Path(__file__).resolve().parent.parent
SCHEMA = ROOT / "helm" / "values.schema.json"
VALUES, COPY = ROOT / "helm" / "values.yaml", ROOT / "cluster" / "cli" / "chart_values.json"


def with_config(chart: dict[str, Any], config: dict[str, Any]) -> dict[str, Any]:
    """The chart's schema with the program's in it."""
    config = dict(config)
    definitions = config.pop("$defs", {})
    own = {name: value for name, value in chart["$defs"].items() if not name.startswith("Config.")}
    renamed = json.loads(
        json.dumps({"config": config, "defs": {f"Config.{name}": one for name, one in definitions.items()}}).replace(
            '"#/$defs/', '"#/$defs/Config.'
        )
    )
    described = {**renamed["config"], "description": "cluster.yaml, verbatim"}
    return {
        **chart,
        "properties": {**chart["properties"], "config": described},
        "$defs": {**own, **renamed["defs"]},
    }


def checked_part(values: dict[str, Any]) -> dict[str, Any]:
    """What the program reads of the chart's values: the configuration and the worker groups."""
    return {"config": values["config"], "ray": {"clusters": values["ray"]["clusters"]}}


def main(arguments: list[str]) -> int:
    """0 when the file is, or now is, as it should be."""
    before = SCHEMA.read_text()
    after = json.dumps(with_config(json.loads(before), Config.model_json_schema(by_alias=True)), indent=1) + "\n"
    values = json.dumps(checked_part(yaml.safe_load(VALUES.read_text())), indent=1) + "\n"
    if "--check" in arguments:
        equal = COPY.exists() and COPY.read_text() == values
        if not equal:
            print(f"{COPY}: is not what {VALUES} says; run scripts/chart_schema.py", file=sys.stderr)
        if before != after:
            print(
                f"{SCHEMA}: config is not what cluster/config/schema.py says; run scripts/chart_schema.py",
                file=sys.stderr,
            )
        return int(before != after or not equal)
    COPY.write_text(values)
    SCHEMA.write_text(after)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
