"""Keep the chart and the program in step.

`config` in helm/values.schema.json is the schema that `headrace config schema` prints. cluster/cli/chart_values.json
is the part of helm/values.yaml into which `headrace config check` merges values. `--check` only compares.
"""

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
    """The chart's schema with the program's schema inserted as `config`."""
    config = dict(config)
    definitions = config.pop("$defs", {})
    own = {name: value for name, value in chart["$defs"].items() if not name.startswith("Config.")}
    renamed = json.loads(
        json.dumps(
            {"config": config, "defs": {f"Config.{name}": value for name, value in definitions.items()}}
        ).replace('"#/$defs/', '"#/$defs/Config.')
    )
    described = {**renamed["config"], "description": "cluster.yaml, verbatim"}
    return {
        **chart,
        "properties": {**chart["properties"], "config": described},
        "$defs": {**own, **renamed["defs"]},
    }


def checked_part(values: dict[str, Any]) -> dict[str, Any]:
    """The part of the chart's values that the program reads: the configuration and the worker groups."""
    return {"config": values["config"], "ray": {"clusters": values["ray"]["clusters"]}}


def main(arguments: list[str]) -> int:
    """Write both files, or with --check compare them. Returns the exit code: 0 if they are up to date."""
    before = SCHEMA.read_text()
    after = json.dumps(with_config(json.loads(before), Config.model_json_schema(by_alias=True)), indent=1) + "\n"
    values = json.dumps(checked_part(yaml.safe_load(VALUES.read_text())), indent=1) + "\n"
    if "--check" in arguments:
        equal = COPY.exists() and COPY.read_text() == values
        if not equal:
            print(f"{COPY}: differs from {VALUES}; run scripts/chart_schema.py", file=sys.stderr)
        if before != after:
            print(
                f"{SCHEMA}: config differs from cluster/config/schema.py; run scripts/chart_schema.py",
                file=sys.stderr,
            )
        return int(before != after or not equal)
    COPY.write_text(values)
    SCHEMA.write_text(after)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
