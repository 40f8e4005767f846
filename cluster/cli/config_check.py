"""What `headrace config check` finds in a file: errors that a process would refuse, and warnings of likely mistakes.

The rules that need only the file are those of cluster/config/schema.py. Here are those that look around: at a model
folder on this machine, at files that the configuration names, and at what only pods or a chart's values have.
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
from cluster.cli.config_inputs import Input, NoConfiguration, groups_of, read_input
from cluster.config.problems import Problem
from cluster.config.schema import Config, Model, remainder, secret_files

DEMO_SHAPE = {
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "num_hidden_layers": 30,
    "max_position_embeddings": 8192,
}
"""Of demo://smollm2's config.json."""
LEAST_TOKENS = 2048
"""The least default of vLLM's max_num_batched_tokens."""
_PODS_READ = (("auth",), ("gateway",), ("link",), ("ray",), ("store",))
"""Sections that rules about pods read: without their wrong keys they have defaults, of which nothing should be said."""
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


@dataclass(frozen=True, slots=True)
class ConfigFinding:
    """An error or a warning: the key's path, what to do, and the line in the file (0: none)."""

    path: str
    message: str
    line: int = 0

    def __str__(self) -> str:
        where = f"{self.path}: " if self.path else ""
        return f"{where}{self.message}{f' (line {self.line})' if self.line else ''}"


@dataclass(frozen=True, slots=True)
class Report:
    """What was found in one file; `config` is there where no rule of the file itself is broken."""

    name: str
    config: Config | None = None
    errors: tuple[ConfigFinding, ...] = ()
    warnings: tuple[ConfigFinding, ...] = ()

    def as_json(self) -> dict[str, Any]:
        """For programs; the same keys whether the file is right or wrong."""

        def plain(findings: tuple[ConfigFinding, ...]) -> list[dict[str, Any]]:
            return [{"path": one.path, "message": one.message, "line": one.line} for one in findings]

        return {
            "file": self.name,
            "ok": not self.errors,
            "errors": plain(self.errors),
            "warnings": plain(self.warnings),
            "config": None if self.config is None else self.config.model_dump(mode="json"),
        }


def check(text: str, name: str, *, pod: bool = False, files: bool = False) -> Report:
    """Look at the text of a cluster.yaml, of a chart's values or of a ConfigMap. `pod`: it is for pods, as values and
    a ConfigMap are. `files`: the files that it names must be on this machine."""
    try:
        given = read_input(text)
    except NoConfiguration as error:
        return Report(name, errors=tuple(ConfigFinding("", one) for one in error.reasons))
    config, wrong = remainder(given.document)
    problems = [*given.problems, *wrong]
    warnings: list[Problem] = []
    if config is not None:
        problems += [one for one in _around(config) if not _under(one, wrong)]
        if given.values is not None:
            problems += [one for one in groups_of(config, given.values) if not _under(one, wrong)]
        if (pod or given.for_pods) and not any(one.path[:1] in _PODS_READ for one in wrong):
            problems += _pods(config)
        if files:
            problems += _files(config)
        warnings += [] if wrong else _likely(config)
    return Report(name, None if problems else config, _found(problems, given), _found(warnings, given))


def _under(problem: Problem, wrong: list[Problem]) -> bool:
    """Whether its model has been found wrong, so that what is left of it says nothing."""
    return any(one.path[:2] == problem.path[:2] or one.path == ("models",) for one in wrong)


def _found(problems: list[Problem], given: Input) -> tuple[ConfigFinding, ...]:
    return tuple(ConfigFinding(given.prefix + one.where, one.text, given.line_of(one.path)) for one in problems)


# ---- what a replica would refuse


def _around(config: Config) -> Iterator[Problem]:
    for at, model in enumerate(config.models):
        for number, version in enumerate(model.versions()):
            path: tuple[str | int, ...] = ("models", at, "canary") if number else ("models", at)
            if version.source.startswith("sim://"):
                yield from _simulated(path, version)
                continue
            yield from _folder(path, version, config)
            shape = shape_of(version.source)
            for choice, spec in enumerate(version.specs()):
                if found := unfit(spec, shape):
                    own = not isinstance(version.gpu, str) and found[0] in version.gpu[choice].model_fields_set
                    yield Problem((*path, *(("gpu", choice) if own else ()), found[0]), found[1])


def _simulated(path: tuple[str | int, ...], model: Model) -> Iterator[Problem]:
    from cluster.worker.engine.simulated.config import SimConfig

    for spec in model.specs():
        try:
            config = SimConfig.from_source(spec.source, spec.engine)
            if not config.folder or Path(config.folder).is_dir():
                config.resolved()
        except (ValueError, OSError) as error:
            yield Problem((*path, "source"), str(error).removeprefix("source: "))
            return


def _folder(path: tuple[str | int, ...], model: Model, config: Config) -> Iterator[Problem]:
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
            f"{model.source!r} is a relative folder, and it is not here; did you mean hf://{model.source}?",
        )


def shape_of(source: str) -> Mapping[str, Any]:
    """A checkpoint's config.json where it is on this machine; empty where it is not."""
    if source.startswith("demo://"):
        return DEMO_SHAPE
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


def unfit(spec: ModelSpec, shape: Mapping[str, Any]) -> tuple[str, str] | None:
    """The key for which a checkpoint of this shape cannot be run as the entry says, and why; None where it can, or
    where it is not known."""
    if text := _undivided(spec.tensor_parallel_size, shape):
        return "tensor_parallel_size", text
    layers = shape.get("num_hidden_layers")
    if isinstance(layers, int) and 0 < layers < spec.pipeline_parallel_size:
        return "pipeline_parallel_size", f"is {spec.pipeline_parallel_size}, and the model has {layers} layers"
    return None


def _undivided(ranks: int, shape: Mapping[str, Any]) -> str:
    """Why heads cannot be divided among so many ranks."""
    heads, kept = shape.get("num_attention_heads"), shape.get("num_key_value_heads")
    if isinstance(heads, int) and heads > 0 and heads % ranks:
        fits = ", ".join(str(n) for n in range(1, 65) if not heads % n)
        return (
            f"is {ranks}, and the model has {heads} attention heads, which {ranks} does not divide: take one of {fits}"
        )
    if isinstance(kept, int) and kept > 0 and kept % ranks and ranks % kept:
        return f"is {ranks}, and the model has {kept} key-value heads: neither divides the other"
    return ""


# ---- what pods would refuse, and files


def _pods(config: Config) -> Iterator[Problem]:
    from cluster.cli.commands.pod import controller_lacks, gateway_lacks

    if config.gateway.processes != 1:
        yield Problem(("gateway", "processes"), "a container holds one process: set 1, and more replicas")
    for told in (*gateway_lacks(config, files=False), *controller_lacks(config, files=False)):
        where, _, text = told.partition(": ")
        yield Problem((where,), text)


def _files(config: Config) -> Iterator[Problem]:
    from cluster.cli.commands.pod import controller_lacks, gateway_lacks, unreadable_file
    from cluster.gateway.guards.files import read_patterns
    from cluster.ledger.files import read_secrets
    from cluster.policy.tenants.patterns import PatternError

    told = [*gateway_lacks(config, pod=False), *controller_lacks(config, pod=False)]
    if config.weights.hugging_face.token_file is not None:
        told += unreadable_file("weights.hugging_face.token_file", config.weights.hugging_face.token_file)
    for one in told:
        where, _, text = one.partition(": ")
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


def _likely(config: Config) -> Iterator[Problem]:
    names = [name for model in config.models for name in (model.name, *model.aliases)]
    if config.auth is not None and names:
        yield from _unknown_models(config, names)
    for at, model in enumerate(config.models):
        for number, version in enumerate(model.versions()):
            path: tuple[str | int, ...] = ("models", at, "canary") if number else ("models", at)
            yield from _likely_of(path, version)
    types = {spec.gpu for model in config.models for spec in model.specs()}
    for kind in config.scaling.gpu_budget:
        if config.models and kind not in types:
            yield Problem(("scaling", "gpu_budget", kind), "no model names this type of GPU: nothing is limited by it")


def _unknown_models(config: Config, names: list[str]) -> Iterator[Problem]:
    """Tenants whose `models` match no name of a model: their callers get MODEL_NOT_FOUND."""
    from_defaults = False
    for at, tenant in enumerate(config.tenants):
        if "models" not in tenant.model_fields_set:
            from_defaults = True
            continue
        for number, pattern in enumerate(tenant.models):
            if not _matches(pattern, names):
                yield Problem(
                    ("tenants", at, "models", number),
                    f"{pattern!r} is no model of this file: there are {', '.join(names)}",
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
    return any(fnmatch.fnmatchcase(name, one) for name in names for one in (pattern, pattern.partition(":")[0]))


def _too_long(model: Model, shape: Mapping[str, Any]) -> str:
    """Why vLLM refuses an entry's max_model_len by default; "" where it does not, or where it cannot be known."""
    positions, length = shape.get("max_position_embeddings"), model.max_model_len
    turns = shape.get("rope_parameters")
    stretched = shape.get("rope_scaling") or (
        isinstance(turns, dict) and turns.get("rope_type", "default") != "default"
    )
    if not isinstance(positions, int) or length is None or not 0 < positions < length or stretched:
        return ""
    if "hf_overrides" in model.engine or "model_max_length" in shape:
        return ""
    return (
        f"is {length}, and the model was made for {positions} positions: vLLM refuses more, unless "
        "VLLM_ALLOW_LONG_MAX_MODEL_LEN is 1 for its engines"
    )


def _likely_of(path: tuple[str | int, ...], model: Model) -> Iterator[Problem]:
    source = model.source
    if "://" not in source and not Path(source).expanduser().is_dir() and not _HUB_NAME.fullmatch(source):
        yield Problem((*path, "source"), f"there is no folder {source} on this machine: it must be on every node")
    sequences = model.engine.get("max_num_seqs")
    if isinstance(sequences, int) and sequences > LEAST_TOKENS and "max_num_batched_tokens" not in model.engine:
        yield Problem(
            (*path, "engine", "max_num_seqs"),
            f"is {sequences}, and must not be above max_num_batched_tokens, whose default is {LEAST_TOKENS} on some "
            "hardware: set both",
        )
    if model.revision and not source.startswith("hf://"):
        text = f"is for hf:// sources; nothing of {source} is pinned by it, `digest` would"
        yield Problem((*path, "revision"), text)
    if text := _too_long(model, shape_of(source)):
        yield Problem((*path, "max_model_len"), text)
    if not source.startswith("sim://") and not shape_of(source):
        for spec in model.specs():
            ranks = spec.tensor_parallel_size
            if ranks & (ranks - 1):
                yield Problem(
                    (*path, "tensor_parallel_size"),
                    f"is {ranks}, no power of two: it must divide the model's attention heads, which this machine "
                    "cannot see",
                )
                return
