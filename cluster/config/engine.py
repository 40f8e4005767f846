"""Checks of a model's `engine:` section against the engine arguments of the pinned vLLM, without importing vLLM.

scripts/engine_arguments.py writes the table vllm_arguments.json. Some arguments make vLLM import a module, load a
plugin or call a factory. Such an argument runs code that the configuration names, and therefore needs
`weights.allow.remote_code`.
"""

from __future__ import annotations

import difflib
import functools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from cluster.config.problems import shown

TABLE = Path(__file__).with_name("vllm_arguments.json")
PARSERS = Path(__file__).with_name("vllm_parsers.json")
PARSER_KEYS = ("tool_call_parser", "reasoning_parser")
"""Keys of an `engine:` section that name the parsers of a model's output. By default, the model's family decides."""
NO_PARSER = "none"
"""Value of a key in PARSER_KEYS that switches the parser off, even if the model's family has one."""
Problem = tuple[str, str]
"""Path of the key below `engine`, and text of the problem."""

# Engine arguments that Headrace sets itself, with the reason in the error message.
OWNED_ENGINE_ARGS = {
    "model": "the entry's `source` says which weights are loaded",
    "model_weights": "the entry's `source` says which weights are loaded",
    "tokenizer": "the tokenizer comes with the entry's `source`, so that the gateway and the engine agree",
    "revision": "set `revision` beside `source`",
    "dtype": "set `dtype` beside `source`",
    "tensor_parallel_size": "set `tensor_parallel_size` beside `source`; it also shapes the placement group",
    "pipeline_parallel_size": "set `pipeline_parallel_size` beside `source`; it also shapes the placement group",
    "max_model_len": "set `max_model_len` beside `source`",
    "trust_remote_code": "set `trust_remote_code` beside `source`; `weights.allow.remote_code` must agree",
    "load_format": "set `load_format` beside `source`; `weights.allow.formats` must agree",
    "distributed_executor_backend": "ranks are placed by Ray on the model's placement group",
    "device_ids": "ranks are placed by Ray on the model's placement group",
    "nnodes": "ranks are placed by Ray on the model's placement group",
    "node_rank": "ranks are placed by Ray on the model's placement group",
    "master_addr": "ranks are placed by Ray on the model's placement group",
    "master_port": "ranks are placed by Ray on the model's placement group",
    "data_parallel_size": "Ray Serve manages the replicas; set `replicas`",
    "data_parallel_size_local": "Ray Serve manages the replicas; set `replicas`",
    "data_parallel_rank": "Ray Serve manages the replicas; set `replicas`",
    "data_parallel_start_rank": "Ray Serve manages the replicas; set `replicas`",
    "data_parallel_address": "Ray Serve manages the replicas; set `replicas`",
    "data_parallel_rpc_port": "Ray Serve manages the replicas; set `replicas`",
    "data_parallel_hybrid_lb": "Ray Serve manages the replicas; set `replicas`",
    "data_parallel_external_lb": "Ray Serve manages the replicas; set `replicas`",
    "data_parallel_multi_port_external_lb": "Ray Serve manages the replicas; set `replicas`",
    "data_parallel_backend": "Ray Serve manages the replicas; set `replicas`",
    "served_model_name": "the entry's `name` and `aliases` are the served names",
    "kv_events_config": "the worker publishes KV events over the link",
    "disable_log_stats": "the worker reads the scheduler's statistics for routing and metrics",
    "lora_target_modules": "vLLM would leave out the other layers of an adapter without an error",
    "default_mm_loras": "a request names its adapter",
    "host": "a worker accepts no connections; it dials the gateways",
    "port": "a worker accepts no connections; it dials the gateways",
    "api_key": "callers are authenticated by the gateway",
    "hf_token": "a token is a secret: set `weights.hugging_face.token_file`",
    "scheduling_policy": "the gateway's fair queue decides; the engine runs with priority scheduling",
    "generation_config": "sampling defaults come from the model's own generation config",
    "skip_tokenizer_init": "the engine needs the tokenizer for grammars",
}

CODE = frozenset(
    {
        "worker_cls",
        "worker_extension_cls",
        "scheduler_cls",
        "logits_processors",
        "model_class_overrides",
        "io_processor_plugin",
        "reasoning_parser_plugin",
        "log_config_file",
        "logging_config.pylogging_config_file",
        "compilation_config.backend",
        "compilation_config.inductor_passes",
        "ec_manager_config.encoder_cache_manager_cls",
        "ec_transfer_config.ec_connector_module_path",
        "kv_transfer_config.kv_connector_module_path",
        "structured_outputs_config.reasoning_parser_plugin",
    }
)
"""Arguments of the pinned vLLM that name code to import, a plugin to load or a factory to call."""
HARMLESS = {"worker_cls": ("auto",), "compilation_config.backend": ("", "eager", "inductor")}
"""Allowed values of arguments in CODE, by argument. These values select code that is built into vLLM."""
LOOKS_LIKE_CODE = re.compile(r"(_cls|_class|_classes|_plugin|_plugins|module_path|class_path|_factory|_callable)$")
"""Pattern of keys whose values are names of code, by vLLM's naming convention. The pattern is applied to mappings with
arbitrary keys, such as `kv_connector_extra_config`."""
CODE_FORBIDDEN = "names code that the engine would run: only where weights.allow.remote_code is true"
MOST_SHOWN = 8
_WORDS = {
    "boolean": "true or false",
    "integer": "a whole number",
    "number": "a number",
    "string": "a string",
    "null": "null",
    "array": "a list",
    "object": "a mapping",
}
_BOUNDS = (("gt", "above"), ("ge", "at least"), ("lt", "below"), ("le", "at most"))


@functools.cache
def arguments() -> Mapping[str, Any]:
    """Return the engine arguments of the pinned vLLM by name, each with the allowed forms and range."""
    rows: Mapping[str, Any] = json.loads(TABLE.read_text())["arguments"]
    return rows


@functools.cache
def parsers(key: str) -> Sequence[str]:
    """Return the names of the pinned vLLM's parsers. `key`: one of PARSER_KEYS."""
    names: Sequence[str] = json.loads(PARSERS.read_text())[key]
    return names


def near(name: str, known: Sequence[str]) -> str:
    """Return `; did you mean X?` with the known name that is closest to `name`; "" if no known name is close."""
    normalized = {candidate.replace("-", "_").lower(): candidate for candidate in known}
    folded = name.replace("-", "_").lower()
    closest = normalized.get(folded) or next(
        (normalized[match] for match in difflib.get_close_matches(folded, normalized, n=1, cutoff=0.7)), None
    )
    return f"; did you mean `{closest}`?" if closest else ""


def engine_problems(engine: Mapping[Any, Any]) -> Iterator[Problem]:
    """Yield a problem for each argument of an `engine:` section that vLLM would refuse or that Headrace sets itself."""
    known = arguments()
    for name, value in engine.items():
        if name in OWNED_ENGINE_ARGS:
            yield str(name), f"is set by Headrace: {OWNED_ENGINE_ARGS[name]}"
        elif name in PARSER_KEYS:
            continue
        elif name not in known:
            yield str(name), f"vLLM has no such engine argument{near(str(name), [*known])}"
        else:
            yield from _problems(str(name), value, known[name])
    yield from parser_problems(engine)


def parser_problems(engine: Mapping[Any, Any]) -> Iterator[Problem]:
    """Yield a problem for each key in PARSER_KEYS whose value names no parser of vLLM or of the section's plugin."""
    for key in PARSER_KEYS:
        known = [*parsers(key), NO_PARSER]
        value = engine.get(key, NO_PARSER)
        if not isinstance(value, str) or not value:
            yield key, f"must be the name of a parser, or {NO_PARSER}, not {shown(value)}"
        elif value not in known and not engine.get(f"{key}_plugin"):
            yield key, f"vLLM has no such parser: {shown(value)}{near(value, known)}; known are {', '.join(known)}"


def together_problems(whole: Mapping[Any, Any]) -> Iterator[Problem]:
    """Yield a problem for each combination of arguments that vLLM would refuse although each argument is valid alone.

    `whole` includes the entry's `tensor_parallel_size` and `max_model_len`. Arguments that are absent are not checked,
    since vLLM chooses their values.
    """
    tokens, length, ranks = (
        _whole_number(whole, name) for name in ("max_num_batched_tokens", "max_model_len", "tensor_parallel_size")
    )
    sequences = _whole_number(whole, "max_num_seqs")
    active, split = _whole_number(whole, "max_num_active_seqs"), _whole_number(whole, "decode_context_parallel_size")
    long = _whole_number(whole, "long_prefill_token_threshold")
    if tokens and sequences and sequences > tokens:
        yield "max_num_seqs", f"is {sequences}, above max_num_batched_tokens ({tokens}): each sequence needs one token"
    if tokens and length and tokens < length and whole.get("enable_chunked_prefill") is False:
        yield (
            "max_num_batched_tokens",
            f"is {tokens}, below max_model_len ({length}), and enable_chunked_prefill is false",
        )
    draft, transfer = whole.get("speculative_config"), whole.get("kv_transfer_config")
    if isinstance(draft, Mapping) and not draft.get("model") and not draft.get("method"):
        yield "speculative_config", "names neither a method nor a model: add one, or remove the key"
    if isinstance(draft, Mapping) and draft.get("method") == "ngram" and not draft.get("num_speculative_tokens"):
        yield "speculative_config.num_speculative_tokens", "is needed by the method ngram"
    if isinstance(transfer, Mapping) and not transfer.get("kv_connector"):
        yield "kv_transfer_config.kv_connector", "is not set: name a connector, or remove kv_transfer_config"
    slots, held = _whole_number(whole, "max_loras") or 1, _whole_number(whole, "max_cpu_loras")
    if held and held < slots:
        yield "max_cpu_loras", f"is {held}, below max_loras ({slots}): the memory holds what the slots hold"
    if active and sequences and active > sequences:
        yield "max_num_active_seqs", f"is {active}, above max_num_seqs ({sequences})"
    if long and length and long > length:
        yield "long_prefill_token_threshold", f"is {long}, above max_model_len ({length})"
    if split and ranks and ranks % split:
        yield "decode_context_parallel_size", f"is {split}, which does not divide tensor_parallel_size ({ranks})"


def _whole_number(whole: Mapping[Any, Any], name: str) -> int:
    value = whole.get(name)
    return value if isinstance(value, int) and not isinstance(value, bool) else 0


def code_arguments(engine: Mapping[Any, Any]) -> Iterator[Problem]:
    """Yield a problem for each argument of an `engine:` section that makes the engine run code named in the section."""
    for name, value in engine.items():
        yield from _code(str(name), value)


def _code(path: str, value: Any) -> Iterator[Problem]:
    last = path.rsplit(".", 1)[-1]
    named = path in CODE or ("." in path and (last in CODE or LOOKS_LIKE_CODE.search(last)))
    if named and value and value not in HARMLESS.get(path, ()):
        yield path, CODE_FORBIDDEN
    elif path == "speculative_config" and isinstance(value, Mapping) and _is_custom_proposer(value):
        yield f"{path}.model", CODE_FORBIDDEN
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _code(f"{path}.{key}", item)
    elif isinstance(value, list):
        for item in value:
            if isinstance(item, Mapping | list):
                yield from _code(path, item)


def _is_custom_proposer(speculative: Mapping[Any, Any]) -> bool:
    """Return whether vLLM would import the `model` of a `speculative_config` as a class instead of loading weights."""
    model = speculative.get("model")
    if speculative.get("method") == "custom_class":
        return True
    if speculative.get("method") is not None or not isinstance(model, str):
        return False
    parts = model.split(".")
    return len(parts) >= 2 and all(part.isidentifier() for part in parts)


def _problems(path: str, value: Any, row: Mapping[str, Any]) -> Iterator[Problem]:
    forms = row.get("any")
    if forms is None:
        return
    form = next((candidate for candidate in forms if _fits(value, candidate)), None)
    if form is None:
        yield path, f"must be {' or '.join(map(_form_in_words, forms)) or 'left out'}, not {shown(value)}"
        return
    if isinstance(value, int | float) and not isinstance(value, bool) and (problem := _range_problem(value, row)):
        yield path, problem
    if isinstance(value, Mapping) and "values" in form:
        for key, item in value.items():
            yield from _problems(f"{path}.{key}", item, {"any": form["values"]})
    if isinstance(value, Mapping) and "fields" in form:
        for key, item in value.items():
            if key not in form["fields"]:
                yield f"{path}.{key}", f"vLLM has no such key{near(str(key), [*form['fields']])}"
            else:
                yield from _problems(f"{path}.{key}", item, form["fields"][key])


def _fits(value: Any, form: Mapping[str, Any]) -> bool:
    if "enum" in form:
        return any(value == choice and isinstance(value, bool) == isinstance(choice, bool) for choice in form["enum"])
    if "names" in form:
        return isinstance(value, str) and value.upper() in (*map(str.upper, form["names"]), "AUTO")
    match form["type"]:
        case "boolean":
            return isinstance(value, bool)
        case "integer":
            return isinstance(value, int) and not isinstance(value, bool)
        case "number":
            return isinstance(value, int | float) and not isinstance(value, bool) and value - value == 0
        case "string":
            return isinstance(value, str)
        case "null":
            return value is None
        case "array":
            items = form.get("items")
            return isinstance(value, list) and (
                items is None or all(any(_fits(item, item_form) for item_form in items) for item in value)
            )
        case _:
            return isinstance(value, Mapping)


def _range_problem(value: float, row: Mapping[str, Any]) -> str:
    """Return why a number is outside the range of the argument; "" if the number is inside the range."""
    wrong = {
        "gt": lambda bound: value <= bound,
        "ge": lambda bound: value < bound,
        "lt": lambda bound: value >= bound,
        "le": lambda bound: value > bound,
    }
    if any(name in row and wrong[name](row[name]) for name, _ in _BOUNDS):
        allowed = " and ".join(f"{word} {row[name]:g}" for name, word in _BOUNDS if name in row)
        percent = (
            f": a part, not a percentage; write {value / 100:g}" if row.get("le") == 1 and 1 < value <= 100 else ""
        )
        return f"must be {allowed}, not {value:g}{percent}"
    return ""


def _form_in_words(form: Mapping[str, Any]) -> str:
    words = form.get("enum") or form.get("names")
    if words is not None:
        few = ", ".join(map(str, words[:MOST_SHOWN]))
        return f"one of {few}{', ...' if len(words) > MOST_SHOWN else ''}"
    if form["type"] == "array" and form.get("items"):
        return f"a list of items, each {' or '.join(map(_form_in_words, form['items']))}"
    return _WORDS[form["type"]]
