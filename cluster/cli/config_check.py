"""The checks of `headrace config check`. Errors are settings that a process would refuse; warnings are likely mistakes.

Rules that need only the text of the file are in cluster/config. The rules in this module need more: a model folder on
this machine, the files that the configuration names, the restrictions of pods, or a chart's values.
"""

from __future__ import annotations

import fnmatch
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.api.types import ModelSpec
from cluster.cli.config_inputs import Input, NoConfiguration, read_input, resource_problems, worker_group_problems
from cluster.cli.model_sizes import ModelSize, engine_of, model_size, named_bytes
from cluster.config.document import without_invalid_keys
from cluster.config.model import Model
from cluster.config.paths import secret_files
from cluster.config.problems import Problem
from cluster.config.schema import Config
from cluster.policy.capacity.fit import Engine, fit
from cluster.policy.capacity.gpus import Gpu, gpu, in_gib

DEMO_SHAPES: Mapping[str, Mapping[str, int]] = {
    "demo://smollm2": {
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "num_hidden_layers": 30,
        "max_position_embeddings": 8192,
    },
    "demo://minilm": {"num_attention_heads": 12, "num_hidden_layers": 6, "max_position_embeddings": 512},
}
"""Excerpts from the config.json of the demo models."""
MIN_BATCHED_TOKENS = 2048
"""Smallest default value of vLLM's max_num_batched_tokens on any hardware, in tokens."""
_POD_SECTIONS = (("auth",), ("gateway",), ("link",), ("ray",), ("store",))
"""Sections of the configuration that the pod rules read.

If one of these sections has errors, the pod rules are skipped. Its invalid keys have been replaced by defaults, so the
rules would report values that are not in the file.
"""
NAMED_AT_LEAST = 0.9
"""Part of the parameters in a model's name that it has at least: names are rounded."""
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


@dataclass(frozen=True, slots=True)
class ConfigFinding:
    """An error or a warning about a key of the configuration.

    `path` is the path of the key. `message` includes the remedy. `line` is the line in the file, or 0 if the key is
    not in the file.
    """

    path: str
    message: str
    line: int = 0

    def __str__(self) -> str:
        where = f"{self.path}: " if self.path else ""
        return f"{where}{self.message}{f' (line {self.line})' if self.line else ''}"


@dataclass(frozen=True, slots=True)
class Report:
    """The findings for one file. `config` is the configuration, or None if there are errors."""

    name: str
    config: Config | None = None
    errors: tuple[ConfigFinding, ...] = ()
    warnings: tuple[ConfigFinding, ...] = ()

    def as_json(self) -> dict[str, Any]:
        """Return the report in the form that --json prints. The keys are the same with and without errors."""

        def plain(findings: tuple[ConfigFinding, ...]) -> list[dict[str, Any]]:
            return [{"path": finding.path, "message": finding.message, "line": finding.line} for finding in findings]

        return {
            "file": self.name,
            "ok": not self.errors,
            "errors": plain(self.errors),
            "warnings": plain(self.warnings),
            "config": None if self.config is None else self.config.model_dump(mode="json"),
        }


def check(text: str, name: str, *, pod: bool = False, files: bool = False) -> Report:
    """Check the text of a cluster.yaml, of a chart's values or of a ConfigMap.

    `pod`: apply the rules for pods also to a cluster.yaml; they always apply to values and ConfigMaps. `files`: require
    that all files that the configuration names exist on this machine.
    """
    try:
        given = read_input(text)
    except NoConfiguration as error:
        return Report(name, errors=tuple(ConfigFinding("", reason) for reason in error.reasons))
    config, wrong = without_invalid_keys(given.document)
    problems = [*given.problems, *wrong]
    warnings: list[Problem] = []
    if config is not None:
        problems += [problem for problem in _model_problems(config) if not _in_wrong_model(problem, wrong)]
        if given.values is not None:
            problems += [
                problem
                for problem in worker_group_problems(config, given.values)
                if not _in_wrong_model(problem, wrong)
            ]
        if (pod or given.for_pods) and not any(problem.path[:1] in _POD_SECTIONS for problem in wrong):
            problems += _pod_problems(config)
        if files:
            problems += _file_problems(config)
        warnings += [] if wrong else _warnings(config)
    errors = (*_findings(problems, given), *_value_findings(given))
    return Report(name, None if errors else config, errors, _findings(warnings, given))


def _in_wrong_model(problem: Problem, wrong: list[Problem]) -> bool:
    """Return whether `problem` is in a model that has an error in `wrong`. This error may have caused the problem."""
    return any(other.path[:2] == problem.path[:2] or other.path == ("models",) for other in wrong)


def _findings(problems: list[Problem], given: Input) -> tuple[ConfigFinding, ...]:
    return tuple(
        ConfigFinding(given.prefix + problem.where, problem.text, given.line_of(problem.path)) for problem in problems
    )


def _value_findings(given: Input) -> Iterator[ConfigFinding]:
    """Yield an error for each of the chart's values outside `config` that Kubernetes would refuse."""
    for problem in resource_problems(given.values):
        line = given.lines.line_of(problem.path) if given.lines is not None else 0
        yield ConfigFinding(problem.where, problem.text, line)


# ---- what a replica would refuse


def _model_problems(config: Config) -> Iterator[Problem]:
    """Yield a problem for each model whose replicas could not start because of its source or its degrees of
    parallelism."""
    for at, model in enumerate(config.models):
        for number, version in enumerate(model.versions()):
            path: tuple[str | int, ...] = ("models", at, "canary") if number else ("models", at)
            if version.source.startswith("sim://"):
                yield from _simulator_problems(path, version)
                continue
            yield from _folder_problems(path, version, config)
            yield from _memory_problems(path, version)
            shape = checkpoint_config(version.source)
            for choice, spec in enumerate(version.specs()):
                if (key_and_text := parallelism_problem(spec, shape)) is not None:
                    key, text = key_and_text
                    own = not isinstance(version.gpu, str) and key in version.gpu[choice].model_fields_set
                    yield Problem((*path, *(("gpu", choice) if own else ()), key), text)


def _simulator_problems(path: tuple[str | int, ...], model: Model) -> Iterator[Problem]:
    from cluster.worker.engine.simulated.config import SimConfig

    for spec in model.specs():
        try:
            config = SimConfig.from_source(spec.source, spec.engine)
            if not config.folder or Path(config.folder).is_dir():
                config.resolved()
        except (ValueError, OSError) as error:
            yield Problem((*path, "source"), str(error).removeprefix("source: "))
            return


def _folder_problems(path: tuple[str | int, ...], model: Model, config: Config) -> Iterator[Problem]:
    from cluster.worker.weights.sources import SourceError, check_folder

    if "://" in model.source:
        return
    folder = Path(model.source).expanduser()
    if folder.is_dir():
        try:
            check_folder(model.spec(), folder, allow_remote_code=config.weights.allow.remote_code)
        except SourceError as error:
            yield Problem((*path, "source"), str(error).split(": ", 1)[1])
    elif _HUB_NAME.fullmatch(model.source):
        yield Problem(
            (*path, "source"),
            f"there is no folder {model.source!r} here; did you mean hf://{model.source}?",
        )


def _memory_problems(path: tuple[str | int, ...], model: Model) -> Iterator[Problem]:
    """Yield a problem for each GPU type whose memory is too small for the weights and one call of the greatest length.

    The memory of a step, which can only be estimated, is left out. Of a model that is not on this machine, only the
    number of parameters in its name is known.
    """
    if model.load_format not in ("auto", "safetensors"):
        return
    for choice, spec in enumerate(model.specs()):
        if (kind := gpu(spec.gpu)) is None:
            continue
        try:
            size = model_size(spec) if Path(spec.source).expanduser().is_dir() else None
        except ValueError:
            return  # _folder_problems says what is wrong, or nothing is known of this architecture
        if text := _memory_problem(spec, kind, size):
            key = ("gpu",) if isinstance(model.gpu, str) else ("gpu", choice, "type")
            yield Problem((*path, *key), text)


def _memory_problem(spec: ModelSpec, kind: Gpu, size: ModelSize | None) -> str:
    """Return a message if a model cannot fit on the GPUs of one replica, else ""."""
    engine = engine_of(spec)
    ranks = engine.tp * engine.pp
    usable = int(kind.memory * engine.utilization)
    on = f"on {'one' if ranks == 1 else f'each of {ranks}'} {kind.name} with {in_gib(usable)}"
    if size is None:
        dtype = "bfloat16" if spec.dtype == "auto" else spec.dtype
        named = named_bytes(spec.source, dtype, str(spec.engine.get("quantization") or ""))
        weights = int((named or 0) * NAMED_AT_LEAST / ranks) - engine.offloaded
        if weights <= usable:
            return ""
        return (
            f"{spec.gpu} is too small: by the model's name, its weights take at least {in_gib(weights)} {on}, "
            f"{in_gib(weights - usable)} too much: {_ranks_needed(int(weights * ranks), kind, engine)}"
        )
    tokens = spec.max_model_len or size.longest
    one = fit(size.shape, kind, engine, tokens or 1)
    if not one.surely_lacking:
        return ""
    cached = "" if one.weights > usable else f" and one call of {tokens:,} tokens {in_gib(one.call)}"
    shorter = " or lower max_model_len" if cached else ""
    return (
        f"{spec.gpu} is too small: the weights take {in_gib(one.weights)}{cached} {on}, "
        f"{in_gib(one.surely_lacking)} too much: {_ranks_needed(size.shape.weights, kind, engine)}{shorter}"
    )


def _ranks_needed(weights: int, kind: Gpu, engine: Engine) -> str:
    """Return the remedy for weights that are too large for the GPUs of a replica."""
    needed = max(weights // int(kind.memory * engine.utilization), engine.tp * engine.pp) + 1
    return (
        "take a larger GPU, or a tensor_parallel_size times pipeline_parallel_size of at least "
        f"{1 << (needed - 1).bit_length()}"
    )


def checkpoint_config(source: str) -> Mapping[str, Any]:
    """Read a checkpoint's config.json. The result is empty if the checkpoint is not on this machine."""
    if source.startswith("demo://"):
        return DEMO_SHAPES.get(source, {})
    if "://" in source:
        return {}
    try:
        values = json.loads((Path(source).expanduser() / "config.json").read_text())
    except (OSError, ValueError):
        return {}
    if not isinstance(values, dict):
        return {}
    inner = values.get("text_config")
    return {**values, **inner} if isinstance(inner, dict) else values


def parallelism_problem(spec: ModelSpec, shape: Mapping[str, Any]) -> tuple[str, str] | None:
    """Check a model's degrees of parallelism against the checkpoint's config.json.

    Returns the key of an invalid degree and a message, or None if no degree is invalid. If the checkpoint is unknown
    (`shape` is empty), the result is None.
    """
    if text := _heads_problem(spec.tensor_parallel_size, shape):
        return "tensor_parallel_size", text
    layers = shape.get("num_hidden_layers")
    if isinstance(layers, int) and 0 < layers < spec.pipeline_parallel_size:
        return (
            "pipeline_parallel_size",
            f"is {spec.pipeline_parallel_size}, and the model has {layers} layers: take at most {layers}",
        )
    return None


def _heads_problem(ranks: int, shape: Mapping[str, Any]) -> str:
    """Return a message if the attention heads cannot be divided among `ranks` ranks, else ""."""
    heads, kv_heads = shape.get("num_attention_heads"), shape.get("num_key_value_heads")
    if isinstance(heads, int) and heads > 0 and heads % ranks:
        divisors = ", ".join(str(n) for n in range(1, 65) if not heads % n)
        return (
            f"is {ranks}, and the model has {heads} attention heads, which {ranks} does not divide: "
            f"take one of {divisors}"
        )
    if isinstance(kv_heads, int) and kv_heads > 0 and kv_heads % ranks and ranks % kv_heads:
        return f"is {ranks}, and the model has {kv_heads} key-value heads: one must divide the other"
    return ""


# ---- what pods would refuse, and files


def _pod_problems(config: Config) -> Iterator[Problem]:
    """Yield a problem for each setting that would keep the processes of a pod from starting."""
    from cluster.cli.commands.run.pod import controller_problems, gateway_problems

    if config.gateway.processes != 1:
        yield Problem(("gateway", "processes"), "a container holds one process: set 1 and raise the replicas")
    for message in (*gateway_problems(config, files=False), *controller_problems(config, files=False)):
        where, _, text = message.partition(": ")
        yield Problem((where,), text)


def _file_problems(config: Config) -> Iterator[Problem]:
    """Yield a problem for each file that the configuration names and that is missing or invalid."""
    from cluster.cli.commands.run.pod import controller_problems, gateway_problems, unreadable_file
    from cluster.gateway.guards.files import read_patterns
    from cluster.ledger.files import read_secrets
    from cluster.policy.tenants.patterns import PatternError

    messages = [*gateway_problems(config, pod=False), *controller_problems(config, pod=False)]
    if config.weights.hugging_face.token_file is not None:
        messages += unreadable_file("weights.hugging_face.token_file", config.weights.hugging_face.token_file)
    for message in messages:
        where, _, text = message.partition(": ")
        yield Problem((where,), text)
    for setting, path in secret_files(config).items():
        if path.is_file() and path.read_bytes().strip():
            try:
                read_secrets(path, setting)
            except ValueError as error:
                yield Problem((setting,), str(error).removeprefix(f"{setting}: "))
    for policy in config.policies():
        for number, rule in enumerate(policy.guards):
            try:
                if rule.patterns_file:
                    read_patterns(rule.patterns_file)
            except PatternError as error:
                yield Problem((f"tenants[{policy.name}]", "guards", number, "patterns_file"), error.remedy)


# ---- likely mistakes


def _warnings(config: Config) -> Iterator[Problem]:
    """Yield a problem for each likely mistake in a configuration that every process would accept."""
    names = [name for model in config.models for name in (model.name, *model.aliases)]
    if config.auth is not None and names:
        yield from _unknown_models(config, names)
    for at, model in enumerate(config.models):
        for number, version in enumerate(model.versions()):
            path: tuple[str | int, ...] = ("models", at, "canary") if number else ("models", at)
            yield from _model_warnings(path, version)
    types = {spec.gpu for model in config.models for spec in model.specs()}
    for kind in config.scaling.gpu_budget:
        if config.models and kind not in types:
            yield Problem(("scaling", "gpu_budget", kind), "no model uses this GPU type: the budget limits nothing")


def _unknown_models(config: Config, names: list[str]) -> Iterator[Problem]:
    """Yield a warning for each pattern in a tenant's `models` that matches no model.

    For `models` of tenant_defaults, a warning is yielded only if none of the patterns matches a model. With such
    defaults, every call of a tenant without `models` of its own would get MODEL_NOT_FOUND.
    """
    from_defaults = False
    for at, tenant in enumerate(config.tenants):
        if "models" not in tenant.model_fields_set:
            from_defaults = True
            continue
        for number, pattern in enumerate(tenant.models):
            if not _matches(pattern, names):
                yield Problem(
                    ("tenants", at, "models", number),
                    f"{pattern!r} is no model of this file; it has {', '.join(names)}",
                )
    defaults = config.tenant_defaults
    if (from_defaults or "models" in defaults.model_fields_set) and not any(
        _matches(p, names) for p in defaults.models
    ):
        yield Problem(
            ("tenant_defaults", "models"),
            f"{', '.join(defaults.models)} is no model of this file, so tenants with these defaults reach none: "
            "give a model this alias, or list others",
        )


def _matches(pattern: str, names: list[str]) -> bool:
    globs = (pattern, pattern.partition(":")[0])
    return any(fnmatch.fnmatchcase(name, glob) for name in names for glob in globs)


def _length_problem(model: Model, shape: Mapping[str, Any]) -> str:
    """Return a message if vLLM would refuse a model's `max_model_len` as too long. `shape`: content of config.json.

    The result is "" if vLLM would accept the length, or if the checkpoint's number of positions is unknown.
    """
    positions, length = shape.get("max_position_embeddings"), model.max_model_len
    rope = shape.get("rope_parameters")
    scaled = shape.get("rope_scaling") or (isinstance(rope, dict) and rope.get("rope_type", "default") != "default")
    if not isinstance(positions, int) or length is None or not 0 < positions < length or scaled:
        return ""
    if "hf_overrides" in model.engine or "model_max_length" in shape:
        return ""
    return (
        f"is {length}, and the model was made for {positions} positions: lower it; vLLM accepts more only if the "
        "engine's environment sets VLLM_ALLOW_LONG_MAX_MODEL_LEN=1"
    )


def _model_warnings(path: tuple[str | int, ...], model: Model) -> Iterator[Problem]:
    source = model.source
    if "://" not in source and not Path(source).expanduser().is_dir() and not _HUB_NAME.fullmatch(source):
        yield Problem((*path, "source"), f"there is no folder {source} on this machine: it must be on every node")
    sequences = model.engine.get("max_num_seqs")
    if isinstance(sequences, int) and sequences > MIN_BATCHED_TOKENS and "max_num_batched_tokens" not in model.engine:
        yield Problem(
            (*path, "engine", "max_num_seqs"),
            f"is {sequences}, and must not exceed max_num_batched_tokens, which defaults to {MIN_BATCHED_TOKENS} on "
            "some hardware: set both",
        )
    if model.revision and not source.startswith("hf://"):
        text = f"is for hf:// sources and does not pin {source}: set `digest` instead"
        yield Problem((*path, "revision"), text)
    if text := _length_problem(model, checkpoint_config(source)):
        yield Problem((*path, "max_model_len"), text)
    if not source.startswith("sim://") and not checkpoint_config(source):
        for spec in model.specs():
            ranks = spec.tensor_parallel_size
            if ranks & (ranks - 1):
                yield Problem(
                    (*path, "tensor_parallel_size"),
                    f"is {ranks}, no power of two: it must divide the model's number of attention heads, which is "
                    "unknown here because the checkpoint is not on this machine",
                )
                return
