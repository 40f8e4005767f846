"""Write two files that keep the chart and the program consistent. With `--check`, only compare the files.

helm/values.schema.json gets the schema that `headrace config schema` prints, as `config`. cluster/cli/chart_values.json
gets a part of helm/values.yaml; `headrace config check` merges an operator's values into this part.
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
    """Return the chart's schema, with the program's schema inserted as `config`."""
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
    """Return the part of the chart's values that the program reads: the configuration and the worker groups."""
    return {"config": values["config"], "ray": {"clusters": values["ray"]["clusters"]}}


def main(arguments: list[str]) -> int:
    """Write both files. With --check, only compare the files.

    Returns the exit code: 0 if both files are up to date.
    """
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
