"""cluster.yaml: read once, checked when built, frozen; an unknown key is refused with its path.

Sections that later releases bring are refused by name rather than accepted and ignored: a bound
that nobody enforces is worse than none. Those about tenants are in config_tenants.
"""

from __future__ import annotations

import fnmatch
import os
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, ValidationError, ValidationInfo, field_validator, model_validator

from cluster.api.outcomes import CallError, Outcome, Violation
from cluster.api.types import ModelSpec
from cluster.config import checks
from cluster.config.gateway import GatewaySettings, Section, Tls, check_address, is_loopback
from cluster.config.problems import Path as KeyPath
from cluster.config.problems import Problem, problems_of, raise_all, shown
from cluster.config.remainder import without
from cluster.config.tenants import (
    CLASSES,
    Auth,
    BudgetWebhook,
    Class,
    Cost,
    Store,
    Tenant,
    TenantDefaults,
    problems_together,
    url_parts,
)
from cluster.config.yaml_reader import Document, Duplicate, NotYaml, read
from cluster.policy.tenants.policy import TenantPolicy

API_VERSION = "headrace/v1"

NOT_YET: dict[str, str] = {}
NOT_YET_MODEL = {
    "adapters": "adapters",
}

LinkAddress = Annotated[
    str,
    Field(pattern=r"^(srv://_[a-z0-9-]+\._tcp(\.[a-zA-Z0-9_-]+)+\.?|(\[[0-9a-fA-F:]+\]|[^:/\s]+):[0-9]{1,5})$"),
    AfterValidator(lambda value: value if value.startswith("srv://") else check_address(value, least=1)),
]
_NAME = re.compile(r"^[a-z0-9]([a-z0-9._-]{0,61}[a-z0-9])?$")
_NO_REVISION = re.compile(r"[\s~^:?*\[\\]")
_NAME_RULE = "must be lower-case letters, digits, '.', '_' or '-', 1 to 63 characters"
# Callers keep the names that they use today, such as meta-llama/Llama-3.1-8B-Instruct or claude-3-5-haiku@20241022.
_ALIAS = re.compile(r"[A-Za-z0-9@]([A-Za-z0-9._:/@+-]{0,126}[A-Za-z0-9+])?")
_ALIAS_RULE = "must be letters, digits, '.', '_', '-', '/', ':', '@' or '+', 1 to 128 characters"


class ConfigError(ValueError):
    """The configuration is wrong; the message names the file, the key's path and the remedy."""


def _web_server(value: str) -> str:
    """A URL of a web server itself. Raises ValueError."""
    parts = url_parts(value)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"{value!r} is no URL of a web server: write https://host or http://host:port")
    return value


class LinkSettings(Section):
    """Read by those who dial: workers and the controller. Empty `gateways` means the local gateway's link port.

    An entry is `host:port`, or `srv://_link._tcp.NAME`: whoever the DNS names there, asked again every few seconds."""

    gateways: tuple[LinkAddress, ...] = ()
    tls: Tls | None = None


class RayCluster(Section):
    """A Ray cluster that exists already. Without any, `cluster up` starts a local one."""

    name: Annotated[str, Field(pattern=_NAME.pattern)]
    dashboard_url: Annotated[str, Field(pattern=r"^https?://"), AfterValidator(_web_server)]
    address: str = ""
    token_file: Path | None = None


class HuggingFace(Section):
    """Where `hf://` sources come from; huggingface_hub's own settings otherwise."""

    endpoint: Annotated[str, AfterValidator(lambda value: _web_server(value) if value else value)] = ""
    token_file: Path | None = None


class Allow(Section):
    """What may be loaded at all. No `licenses`: any, also where a model says nothing of its own."""

    sources: tuple[str, ...] = ("*",)
    licenses: tuple[str, ...] = ()
    formats: tuple[str, ...] = ("safetensors",)
    remote_code: bool = False


class Weights(Section):
    """Where weights rest on each node, and which are allowed."""

    cache_dir: Path | None = None
    hugging_face: HuggingFace = HuggingFace()
    allow: Allow = Allow()


class Observe(Section):
    """Logs and metrics. `max_tenant_series`: tenants that metrics name, the first to call; the rest are `other`."""

    log_level: Literal["debug", "info", "warning", "error"] = "info"
    max_tenant_series: Annotated[int, Field(ge=0, le=100_000)] = 500
    budget_webhook: BudgetWebhook | None = None


class Replicas(Section):
    """Bounds on the number of replicas. `idle_s` with `min: 0`: none after so long without a call."""

    min: Annotated[int, Field(ge=0, le=1000)] = 1
    max: Annotated[int, Field(ge=1, le=1000)] | None = None
    idle_s: Annotated[float, Field(ge=0)] = 0.0

    @model_validator(mode="after")
    def _ordered(self) -> Replicas:
        if self.max is not None and self.max < self.min:
            raise ValueError(f"max ({self.max}) is below min ({self.min})")
        if self.idle_s > 0 and self.min > 0:
            raise ValueError("idle_s is for scaling to zero, which needs min: 0")
        return self


class Gpu(Section):
    """One kind of GPU that a model may run on, with what is different there."""

    type: Annotated[str, Field(min_length=1)]
    tensor_parallel_size: Annotated[int, Field(ge=1, le=64)] | None = None
    pipeline_parallel_size: Annotated[int, Field(ge=1, le=64)] | None = None
    engine: Mapping[str, Any] = Field(default_factory=dict)


class Rollback(Section):
    """When a version on trial goes by itself: it fails, or its first token takes, so many times as much; 0: never."""

    error_ratio: Annotated[float, Field(ge=0, le=1000)] = 1.5
    ttft_ratio: Annotated[float, Field(ge=0, le=1000)] = 1.2

    @field_validator("error_ratio", "ttft_ratio")
    @classmethod
    def _more(cls, value: float) -> float:
        if 0 < value < 1:
            raise ValueError(f"{value:g} would take back a version that is better; at least 1, or 0 for never")
        return value


class Canary(Section):
    """A second version of a model, which gets `weight` of its calls. What it does not name is the model's own."""

    version: str
    weight: Annotated[float, Field(ge=0, le=1)] = 0.05
    rollback: Rollback = Rollback()
    source: Annotated[str, Field(min_length=1)] | None = None
    revision: str | None = None
    digest: Annotated[str, Field(pattern=r"^(sha256:[0-9a-f]{64})?$")] = ""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] | None = None
    tensor_parallel_size: Annotated[int, Field(ge=1, le=64)] | None = None
    pipeline_parallel_size: Annotated[int, Field(ge=1, le=64)] | None = None
    max_model_len: Annotated[int, Field(ge=1)] | None = None
    engine: Mapping[str, Any] | None = None
    ray: str | None = None

    @field_validator("version")
    @classmethod
    def _name(cls, value: str) -> str:
        return _checked_name(value)

    @field_validator("source")
    @classmethod
    def _source(cls, value: str | None) -> str | None:
        if value is not None and (why := checks.source_problem(value)):
            raise ValueError(why)
        return value

    def own(self) -> dict[str, Any]:
        """What it has instead of the model's own, by the model's keys."""
        given = self.model_dump(exclude_unset=True, exclude={"weight", "rollback"})
        return {key: value for key, value in given.items() if value is not None} | {"digest": self.digest}


def _checked_name(value: str) -> str:
    if not _NAME.fullmatch(value):
        raise ValueError(f"{value!r} {_NAME_RULE}")
    return value


class SloSettings(Section):
    """What callers are to get: the first token within `ttft_s`, the others `itl_s` apart in the mean, for a share of
    `target` of the calls. Scaling aims at it."""

    ttft_s: Annotated[float, Field(gt=0, le=3600)] = 2.0
    itl_s: Annotated[float, Field(gt=0, le=60)] = 0.1
    target: Annotated[float, Field(gt=0, lt=1)] = 0.99


class Scaling(Section):
    """How numbers of replicas follow the demand.

    `gpu_budget`: GPUs that all models together may hold, by type ("" where models name none); a type that is not there
    is not limited. `cold_start_s`: of a model whose own is not learnt yet. `forecast`: act ahead of demand that is
    expected. `frozen`: nothing changes by itself.
    """

    gpu_budget: Mapping[str, Annotated[int, Field(ge=0)]] = Field(default_factory=dict)
    cold_start_s: Annotated[float, Field(gt=0, le=86_400)] = 60.0
    forecast: bool = True
    frozen: bool = False

    @field_validator("forecast")
    @classmethod
    def _ahead(cls, value: bool) -> bool:
        if not value:
            raise ValueError("false is not in this release: the policy always acts ahead; leave the key out")
        return value


class Model(Section):
    """One model. Engine words are vLLM's own. `gpu`: one type, or several, the one to use first at the front."""

    name: str
    aliases: tuple[str, ...] = ()
    source: Annotated[str, Field(min_length=1)]
    version: str = "v1"
    revision: str = ""
    digest: Annotated[str, Field(pattern=r"^(sha256:[0-9a-f]{64})?$")] = ""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    tensor_parallel_size: Annotated[int, Field(ge=1, le=64)] = 1
    pipeline_parallel_size: Annotated[int, Field(ge=1, le=64)] = 1
    max_model_len: Annotated[int, Field(ge=1)] | None = None
    replicas: Replicas = Replicas()
    gpu: str | tuple[Gpu, ...] = ""
    slo: SloSettings = SloSettings()
    engine: Mapping[str, Any] = Field(default_factory=dict)
    ray: str = ""
    license: str = ""
    fallback: tuple[str, ...] = ()
    canary: Canary | None = None
    allow_cross_node_tensor_parallel: bool = False
    trust_remote_code: bool = False
    load_format: str = "safetensors"

    @field_validator("name", "version")
    @classmethod
    def _name(cls, value: str) -> str:
        return _checked_name(value)

    @field_validator("aliases")
    @classmethod
    def _aliases(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        wrong = [(at, alias) for at, alias in enumerate(value) if not _ALIAS.fullmatch(alias)]
        raise_all(Problem((at,), f"{alias!r} {_ALIAS_RULE}") for at, alias in wrong)
        return value

    @field_validator("source")
    @classmethod
    def _source(cls, value: str) -> str:
        if why := checks.source_problem(value):
            raise ValueError(why)
        return value

    @field_validator("gpu")
    @classmethod
    def _types(cls, value: str | tuple[Gpu, ...]) -> str | tuple[Gpu, ...]:
        types = [] if isinstance(value, str) else [one.type for one in value]
        if not isinstance(value, str) and not types:
            raise ValueError("is an empty list: name a type, or leave the key out for any")
        if len(set(types)) < len(types):
            raise ValueError(f"names a type twice: {', '.join(types)}")
        return value

    @model_validator(mode="after")
    def _two_versions(self) -> Model:
        if self.canary is not None and self.canary.version == self.version:
            raise ValueError(f"canary.version {self.version!r} is the model's own: give the canary another")
        return self

    @model_validator(mode="after")
    def _arguments(self) -> Model:
        raise_all(
            problem
            for path, source, engine, whole in self.engines()
            for problem in checks.engine_of(path, source, engine, whole)
        )
        return self

    def engines(self) -> Iterator[tuple[KeyPath, str, Mapping[str, Any], Mapping[str, Any]]]:
        """Every `engine:` section of the entry: its path, the source that it is for, its arguments, and all arguments
        that its engine is started with."""

        def whole(engine: Mapping[str, Any], ranks: int | None, length: int | None) -> Mapping[str, Any]:
            own = {"tensor_parallel_size": ranks or self.tensor_parallel_size, "max_model_len": length}
            return {**engine, **own}

        yield ("engine",), self.source, self.engine, whole(self.engine, None, self.max_model_len)
        for at, choice in enumerate(() if isinstance(self.gpu, str) else self.gpu):
            both = {**self.engine, **choice.engine}
            yield (
                ("gpu", at, "engine"),
                self.source,
                choice.engine,
                whole(both, choice.tensor_parallel_size, self.max_model_len),
            )
        trial = self.canary
        if trial is not None and trial.engine is not None:
            length = trial.max_model_len or self.max_model_len
            yield (
                ("canary", "engine"),
                trial.source or self.source,
                trial.engine,
                whole(trial.engine, trial.tensor_parallel_size, length),
            )

    def versions(self) -> tuple[Model, ...]:
        """The model as it is without a canary, and its canary as if it were the model; the weights are the specs'."""
        plain = self.model_copy(update={"canary": None})
        if self.canary is None:
            return (plain,)
        return plain, plain.model_copy(update=self.canary.own())

    def specs(self) -> tuple[ModelSpec, ...]:
        """One for each application that may run: every version on every type of GPU, the first choice first."""
        trial = self.canary.weight if self.canary is not None else 0.0
        rules = self.canary.rollback if self.canary is not None else Rollback(error_ratio=0, ttft_ratio=0)
        found: list[ModelSpec] = []
        for number, version in enumerate(self.versions()):
            ratios = (rules.error_ratio, rules.ttft_ratio) if number else (0.0, 0.0)
            spec = replace(
                version.spec(), weight=trial if number else 1.0 - trial, error_ratio=ratios[0], ttft_ratio=ratios[1]
            )
            choices = () if isinstance(version.gpu, str) else version.gpu
            found += [_on(spec, choice) for choice in choices] or [spec]
        return tuple(found)

    def spec(self) -> ModelSpec:
        """The entry as the packages below see it, without its canary, on the first type of GPU."""
        return ModelSpec(
            name=self.name,
            source=self.source,
            aliases=self.aliases,
            version=self.version,
            revision=self.revision,
            dtype=self.dtype,
            tensor_parallel_size=self.tensor_parallel_size,
            pipeline_parallel_size=self.pipeline_parallel_size,
            max_model_len=self.max_model_len,
            min_replicas=self.replicas.min,
            max_replicas=self.replicas.max if self.replicas.max is not None else max(self.replicas.min, 1),
            idle_s=self.replicas.idle_s,
            gpu=self.gpu if isinstance(self.gpu, str) else "",
            slo_ttft_s=self.slo.ttft_s,
            slo_itl_s=self.slo.itl_s,
            slo_target=self.slo.target,
            engine=dict(self.engine),
            allow_cross_node_tensor_parallel=self.allow_cross_node_tensor_parallel,
            trust_remote_code=self.trust_remote_code,
            load_format=self.load_format,
            digest=self.digest,
            license=self.license.lower(),
            ray=self.ray,
            fallback=self.fallback,
        )


def _on(spec: ModelSpec, choice: Gpu) -> ModelSpec:
    return replace(
        spec,
        gpu=choice.type,
        tensor_parallel_size=choice.tensor_parallel_size or spec.tensor_parallel_size,
        pipeline_parallel_size=choice.pipeline_parallel_size or spec.pipeline_parallel_size,
        engine={**spec.engine, **choice.engine},
    )


_WHY_NOT = {
    "auth": "whoever reaches it could use every model",
    "gateway.tls": "keys would travel for everybody to read",
    "auth and gateway.tls": "whoever reaches it could use every model and read what others ask",
}


class Config(Section):
    """The whole file."""

    api_version: Literal["headrace/v1"]
    name: Annotated[str, Field(pattern=_NAME.pattern)]
    gateway: GatewaySettings = GatewaySettings()
    link: LinkSettings = LinkSettings()
    ray: tuple[RayCluster, ...] = ()
    weights: Weights = Weights()
    observe: Observe = Observe()
    models: tuple[Model, ...]
    auth: Auth | None = None
    store: Store = Store()
    cost: Cost | None = None
    scaling: Scaling = Scaling()
    classes: tuple[Class, ...] = CLASSES
    tenant_defaults: TenantDefaults = TenantDefaults()
    tenants: tuple[Tenant, ...] = ()

    def _who_may_call(self) -> Iterator[Problem]:
        yield from problems_together(self.auth, self.classes, self.tenant_defaults, self.tenants)
        gateway, auth = self.gateway, self.auth
        if self.observe.budget_webhook is not None and auth is None:
            yield Problem(("observe", "budget_webhook"), "without auth there are no tenants and no budgets: set auth")
        for listener in ("grpc", "http", "admin"):
            address = getattr(gateway.listen, listener)
            lacks = " and ".join(
                name for name, there in (("auth", auth), ("gateway.tls", gateway.tls)) if there is None
            )
            if lacks and not is_loopback(address):
                text = (
                    f"is {address}, off loopback, without {lacks}: {_WHY_NOT[lacks]}. "
                    "Set both auth and gateway.tls, or listen on 127.0.0.1"
                )
                yield Problem(("gateway", "listen", listener), text)
        if auth is not None and auth.client_certificates and (gateway.tls is None or not gateway.tls.client_ca_file):
            text = "nobody's certificate could be verified: set gateway.tls.client_ca_file"
            yield Problem(("auth", "client_certificates"), text)
        if auth is not None and self.ray and auth.cluster_secret_file is None:
            text = "with a Ray cluster of its own every gateway needs the same secret: name a file that all have"
            yield Problem(("auth", "cluster_secret_file"), text)

    def policies(self) -> tuple[TenantPolicy, ...]:
        """The tenants that this file declares, each whole."""
        return tuple(tenant.policy(self.tenant_defaults) for tenant in self.tenants)

    @model_validator(mode="after")
    def _together(self, info: ValidationInfo) -> Config:
        absent = (info.context or {}).get("absent", ())
        raise_all(
            (
                *self._who_may_call(),
                *checks.names(self.models),
                *checks.fallbacks(self.models, absent),
                *self._not_allowed(),
                *checks.budgets([*self._needs()], self.scaling.gpu_budget),
            )
        )
        return self

    def _not_allowed(self) -> Iterator[Problem]:
        """Models that ask for what `weights.allow` or `ray` does not have."""
        allow, rays = self.weights.allow, [one.name for one in self.ray]
        for at, model in enumerate(self.models):
            where: KeyPath = ("models", at)
            if model.trust_remote_code and not allow.remote_code:
                text = "is true but weights.allow.remote_code is not: both must say so"
                yield Problem((*where, "trust_remote_code"), text)
            if model.load_format not in allow.formats:
                text = f"weights.allow.formats does not list {model.load_format!r}; it has {', '.join(allow.formats)}"
                yield Problem((*where, "load_format"), text)
            elif model.load_format == "gguf":
                text = "gguf files are not served yet: use the model's safetensors form"
                yield Problem((*where, "load_format"), text)
            if allow.licenses and model.license and model.license.lower() not in map(str.lower, allow.licenses):
                text = f"{model.license!r} is not among weights.allow.licenses ({', '.join(allow.licenses)})"
                yield Problem((*where, "license"), text)
            if not allow.remote_code:
                for path, source, engine, _ in model.engines():
                    if not source.startswith("sim://"):
                        yield from checks.code_of((*where, *path), engine)
            for number, version in enumerate(model.versions()):
                there: KeyPath = (*where, "canary") if number else where
                if not any(fnmatch.fnmatchcase(version.source, pattern) for pattern in allow.sources):
                    text = f"{version.source!r} is not among weights.allow.sources ({', '.join(allow.sources)})"
                    yield Problem((*there, "source"), text)
                if version.source.startswith("hf://") and _NO_REVISION.search(version.revision):
                    text = f"{version.revision!r} is no branch, tag or commit: those have no blanks and none of ~^:?*["
                    yield Problem((*there, "revision"), text)
                if version.ray and version.ray not in rays:
                    text = f"there is no Ray cluster {version.ray!r}; ray has {', '.join(rays) or 'none'}"
                    yield Problem((*there, "ray"), text)

    def _needs(self) -> Iterator[checks.Need]:
        for at, model in enumerate(self.models):
            if model.source.startswith("sim://"):
                continue
            for spec in model.model_copy(update={"canary": None}).specs():
                yield at, spec.gpu, spec.tensor_parallel_size * spec.pipeline_parallel_size, spec.min_replicas

    @field_validator("ray")
    @classmethod
    def _apart(cls, value: tuple[RayCluster, ...]) -> tuple[RayCluster, ...]:
        if len({one.name for one in value}) < len(value):
            raise ValueError("two entries have the same name")
        urls = [one.dashboard_url.rstrip("/").lower() for one in value]
        if twice := next((url for at, url in enumerate(urls) if url in urls[:at]), ""):
            raise ValueError(f"two entries have the dashboard_url {twice}: one Ray cluster is one entry")
        return value


def _refuse_not_yet(data: Mapping[str, Any]) -> Iterator[Problem]:
    for key, what in NOT_YET.items():
        if key in data:
            yield Problem((key,), f"{what}: not in this release; remove the section")
    models = data.get("models")
    for i, entry in enumerate(models if isinstance(models, list) else []):
        for key, what in NOT_YET_MODEL.items():
            if isinstance(entry, dict) and key in entry:
                yield Problem(("models", i, key), f"{what}: not in this release; remove the key")


def parse(text: str, where: str = "configuration") -> Config:
    """Check a cluster.yaml. Raises ConfigError naming every wrong key by its path."""
    document = read_document(text, where)
    config, wrong = examine(document)
    if config is None:
        raise ConfigError("\n".join(line(problem, where, document) for problem in wrong))
    return config


def read_document(text: str, where: str) -> Document:
    """The YAML of a cluster.yaml, which may hold keys twice. Raises ConfigError."""
    try:
        document = read(text)
    except NotYaml as error:
        raise ConfigError(f"{where}: {error}") from None
    if not isinstance(document.data, dict):
        raise ConfigError(f"{where}: expected a mapping that begins with `api_version: {API_VERSION}`")
    return document


def line(problem: Problem, where: str, document: Document) -> str:
    """A problem as one line of an error message, with the file and the line in it."""
    at = document.line_of(problem.path)
    return f"{where}: {problem}{f' (line {at})' if at else ''}"


def examine(document: Document, absent: Collection[str] = ()) -> tuple[Config | None, list[Problem]]:
    """The configuration of a document, None when it is wrong; and all that is wrong with it. `absent`: names of models
    that were left out of it, which fallbacks may have."""
    config, wrong = remainder(document, absent)
    return (None if wrong else config), wrong


def remainder(document: Document, absent: Collection[str] = ()) -> tuple[Config | None, list[Problem]]:
    """What is left of a document without its wrong keys, and all that is wrong with it.

    A wrong key hides what depends on its value, so it is taken out and the rest is looked at again. Of `models`, an
    entry that cannot be mended so is called LEFT_OUT and its position.
    """
    zero_bytes = [*_zero_bytes((), document.data, set())]
    wrong = [_twice(one) for one in document.duplicates] + [*_refuse_not_yet(document.data), *zero_bytes]
    out = [one.path for one in wrong if one in zero_bytes or one.path[-1] in NOT_YET_MODEL]
    data: Any = without(document.data, out)
    taken: list[KeyPath] = []
    while data is not None and len(taken) < MOST_PROBLEMS:
        try:
            return Config.model_validate(data, context={"absent": {*absent, *names_of(document.data)}}), wrong
        except ValidationError as error:
            found = problems_of(error, Config)
        wrong += [one for one in found if one not in wrong and not _follows(one, taken)]
        taken += [one.path for one in found]
        data = without(data, [one.path for one in found])
    return None, wrong


def _zero_bytes(path: KeyPath, value: Any, seen: set[int]) -> Iterator[Problem]:
    """Texts that no file name and no program's argument may be; once where YAML's aliases repeat a value."""
    if isinstance(value, str) and "\0" in value:
        yield Problem(path, f"{shown(value)} holds a zero byte (\\0): take it out")
    if not isinstance(value, dict | list) or id(value) in seen:
        return
    seen.add(id(value))
    for key, item in value.items() if isinstance(value, dict) else enumerate(value):
        yield from _zero_bytes((*path, key if isinstance(key, str | int) else str(key)), item, seen)


MOST_PROBLEMS = 1000
_DEPENDS_ON_ALL = ("gateway", "auth", "classes", "tenants", "tenant_defaults", "ray", "observe")
_MODELS_DEPEND_ON = ("weights", "ray", "scaling")


def _twice(one: Duplicate) -> Problem:
    text = f"the key stands here again, first in line {one.first_line}; only the last would count: keep one of them"
    return Problem(one.path, text)


def _follows(problem: Problem, taken: Sequence[KeyPath]) -> bool:
    """Whether a problem may be there only because other keys were taken out."""
    if problem.missing and problem.path in taken:
        return True
    section = problem.path[0] if problem.path else ""
    sections = {path[0] for path in taken if path}
    if section in ("models", "scaling"):
        within = [path for path in taken if path[:2] == problem.path[:2] or problem.path[: len(path)] == path]
        return any(one in sections for one in _MODELS_DEPEND_ON) or (problem.missing and bool(within))
    return any(one in sections for one in _DEPENDS_ON_ALL)


def names_of(data: Any) -> set[str]:
    """Names and aliases of the entries of a document's models, as far as they can be read."""
    entries = data.get("models") if isinstance(data, dict) else None
    found: set[str] = set()
    for entry in entries if isinstance(entries, list) else ():
        if isinstance(entry, dict):
            aliases = entry.get("aliases")
            found |= {
                one
                for one in (entry.get("name"), *(aliases if isinstance(aliases, list) else ()))
                if isinstance(one, str)
            }
    return found


def with_models(config: Config, entries: Sequence[Mapping[str, Any]], absent: Collection[str] = ()) -> Config:
    """The same with other models, checked whole. `absent` as for `examine`. Raises CallError that names every wrong key
    by the model's name."""
    plain: dict[str, Any] = config.model_dump(mode="json", exclude_unset=True, by_alias=True)
    made, wrong = examine(Document(plain | {"models": [dict(entry) for entry in entries]}), absent)
    if made is None:
        names = [str(entry.get("name")) for entry in entries]
        told = [Violation(_by_name(problem.where, names), problem.text) for problem in wrong]
        raise CallError(
            Outcome.INVALID_FIELD, "; ".join(f"{one.field}: {one.description}" for one in told), violations=told
        )
    return made


def _by_name(where: str, names: Sequence[str]) -> str:
    return re.sub(r"^models\[(\d+)\]", lambda found: f"models[{names[int(found[1])]}]", where)


def entry_of(model: Model) -> dict[str, Any]:
    """A model's entry as plain values, without what is the default anyway: equal for models that are equal."""
    plain: dict[str, Any] = model.model_dump(mode="json", exclude_defaults=True)
    return {"name": model.name, "source": model.source} | plain


def load(path: Path) -> Config:
    """Read and check a file. Raises ConfigError."""
    return parse(read_text(path), str(path))


def read_text(path: Path) -> str:
    """The text of a file. Raises ConfigError."""
    try:
        return path.read_text()
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: is not UTF-8: {error.reason} at byte {error.start}") from None


def secret_files(config: Config) -> Mapping[str, Path]:
    """Where the secrets of `auth` rest, by setting: the files it names, else those of the cache folder."""
    if config.auth is None:
        return {}
    files = {"auth.cluster_secret_file": config.auth.cluster_secret_file or cache_dir() / "cluster-secret"}
    if config.auth.api_keys is not None:
        pepper = config.auth.api_keys.pepper_file
        files["auth.api_keys.pepper_file"] = pepper or cache_dir() / "key-pepper"
    return files


def database_url(config: Config) -> str:
    """The ledger's database: the file's, else one in the cache folder."""
    return config.store.database_url or f"sqlite:///{cache_dir() / 'ledger.db'}"


def cache_dir() -> Path:
    """HEADRACE_CACHE_DIR, else the user's cache folder: models made here, tokenizer bundles, the last catalog."""
    named = os.environ.get("HEADRACE_CACHE_DIR")
    if named:
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME", str(Path.home() / ".cache"))) / "headrace"
