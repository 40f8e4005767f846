"""Keep the chart's schema at the program's own: `config` in helm/values.schema.json is what `headrace config schema`
prints. `--check` only says whether it is."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from cluster.config import Config

SCHEMA = Path(__file__).resolve().parent.parent / "helm" / "values.schema.json"


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


def main(arguments: list[str]) -> int:
    """0 when the file is, or now is, as it should be."""
    before = SCHEMA.read_text()
    after = json.dumps(with_config(json.loads(before), Config.model_json_schema(by_alias=True)), indent=1) + "\n"
    if "--check" in arguments:
        if before != after:
            print(f"{SCHEMA}: config is not what cluster/config.py says; run scripts/chart_schema.py", file=sys.stderr)
        return int(before != after)
    SCHEMA.write_text(after)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
