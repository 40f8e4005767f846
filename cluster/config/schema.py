"""The schema of cluster.yaml. The file is read once, checked completely, then frozen.

Unknown keys are refused, including sections that only later releases know, since a limit that is accepted and not
enforced is worse than an error. The error names the path of the key. tenants.py has the sections about tenants, and
gateway.py has the `gateway` section.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, ValidationError, ValidationInfo, field_validator, model_validator

from cluster.api.adapters import AdapterSpec
from cluster.api.outcomes import CallError, Outcome, Violation
from cluster.api.types import ModelSpec
from cluster.config import checks
from cluster.config.adapters import Adapter, as_list, duplicates, engine_with_lora, name_conflicts
from cluster.config.gateway import GatewaySettings, Tls, check_address, is_loopback
from cluster.config.problems import Path as KeyPath
from cluster.config.problems import Problem, problems_of, raise_all, shown
from cluster.config.remainder import without
from cluster.config.routing import Routing
from cluster.config.section import Section, url_parts
from cluster.config.tenants import (
    CLASSES,
    Auth,
    BudgetWebhook,
    Cost,
    PriorityClass,
    Store,
    Tenant,
    TenantDefaults,
    problems_together,
)
from cluster.config.tracing import Tracing
from cluster.config.yaml_reader import Document, Duplicate, NotYaml, read
from cluster.policy.catalog.allowed_sources import is_allowed_source
from cluster.policy.routing.gateway_subset import ALL_UP_TO
from cluster.policy.tenants.policy import TenantPolicy

API_VERSION = "headrace/v1"

LinkAddress = Annotated[
    str,
    Field(pattern=r"^(srv://_[a-z0-9-]+\._tcp(\.[a-zA-Z0-9_-]+)+\.?|(\[[0-9a-fA-F:]+\]|[^:/\s]+):[0-9]{1,5})$"),
    AfterValidator(lambda value: value if value.startswith("srv://") else check_address(value, least=1)),
]
_NAME = re.compile(r"^[a-z0-9]([a-z0-9._-]{0,61}[a-z0-9])?$")
_NO_REVISION = re.compile(r"[\s~^:?*\[\\]")
_NAME_RULE = "must be lower-case letters, digits, '.', '_' or '-', 1 to 63 characters"
# Aliases allow the names that callers already use, such as meta-llama/Llama-3.1-8B-Instruct or
# claude-3-5-haiku@20241022.
_ALIAS = re.compile(r"[A-Za-z0-9@]([A-Za-z0-9._:/@+-]{0,126}[A-Za-z0-9+])?")
_ALIAS_RULE = "must be letters, digits, '.', '_', '-', '/', ':', '@' or '+', 1 to 128 characters"


class ConfigError(ValueError):
    """Raised when the configuration is invalid. The message names the file, the key's path and the remedy."""


def _web_server(value: str) -> str:
    """Return the URL of a web server unchanged. Raises ValueError for anything else."""
    parts = url_parts(value)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"{value!r} is no URL of a web server: write https://host or http://host:port")
    return value


class LinkSettings(Section):
    """Gateways that workers and the controller connect to. Default: the local gateway's link port.

    An entry is `host:port`, or `srv://_link._tcp.NAME`, an SRV record that is resolved again every few seconds."""

    gateways: tuple[LinkAddress, ...] = ()
    """Link addresses, each `host:port` or `srv://_link._tcp.NAME`; empty: the local gateway."""
    max_gateways: Annotated[int, Field(ge=2, le=1024)] = ALL_UP_TO
    """Number of gateways to which each worker connects, if there are more. Workers of a model with few `replicas.min`
    connect to more, so that each gateway has about 16 of them, or all."""
    tls: Tls | None = None
    """The worker or the controller presents it to gateways."""


class RayCluster(Section):
    """An existing Ray cluster. Without any, `headrace up` starts a local one."""

    name: Annotated[str, Field(pattern=_NAME.pattern)]
    """Name to which `models[].ray` refers."""
    dashboard_url: Annotated[str, Field(pattern=r"^https?://"), AfterValidator(_web_server)]
    """URL of Ray's dashboard, which has the job API."""
    address: str = ""
    """Not used."""
    token_file: Path | None = None
    """File with the token of Ray's API."""


class HuggingFace(Section):
    """Server and token for `hf://` sources; by default those of huggingface_hub."""

    endpoint: Annotated[str, AfterValidator(lambda value: _web_server(value) if value else value)] = ""
    """URL of a mirror; empty: that of huggingface_hub."""
    token_file: Path | None = None
    """File with the token for gated repositories."""


class Allow(Section):
    """Rules for the weights that models may load. Empty `licenses` allow any license, and models without one."""

    sources: tuple[str, ...] = ("*",)
    """Globs of the sources that models may name."""
    licenses: tuple[str, ...] = ()
    """Licenses that models may have; empty: any, or none."""
    formats: tuple[str, ...] = ("safetensors",)
    """Values that `models[].load_format` may have."""
    remote_code: bool = False
    """Whether models may run code of their own (`models[].trust_remote_code`)."""


class Weights(Section):
    """The folder of weights on each node, and what may be loaded."""

    cache_dir: Path | None = None
    """Folder of weights on each node. None: `HEADRACE_CACHE_DIR`, else `headrace` in the user's cache folder."""
    hugging_face: HuggingFace = HuggingFace()
    allow: Allow = Allow()


class AccessLogSettings(Section):
    """The access log: one line a call, the event `call.ended`. Failed and resumed calls are always logged."""

    sample_ratio: Annotated[float, Field(ge=0, le=1)] = 1.0
    """Share of the calls that went well which are logged; 0: none. The trace id decides, else the request id."""
    max_lines_per_s: Annotated[int, Field(ge=1, le=10_000)] = 100
    """Most lines a second and process, for calls that went well and for the others each. The next line counts those
    that were left out."""


class Observe(Section):
    """Logs and metrics. Metrics name the first `max_tenant_series` tenants that call; `other` stands for the rest."""

    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """Least severe level that is logged."""
    max_tenant_series: Annotated[int, Field(ge=0, le=100_000)] = 500
    """Tenants with metrics of their own; later ones share the label `other`."""
    access_log: AccessLogSettings = AccessLogSettings()
    budget_webhook: BudgetWebhook | None = None
    tracing: Tracing | None = None
    """Export of traces; without it calls are not traced."""


class Replicas(Section):
    """Bounds on the number of replicas. With `min: 0`, a model without calls for `idle_s` is scaled to zero."""

    min: Annotated[int, Field(ge=0, le=1000)] = 1
    """Least number of replicas; 0: the model may be scaled to zero."""
    max: Annotated[int, Field(ge=1, le=1000)] | None = None
    """Largest number of replicas. None: `min`, at least 1."""
    idle_s: Annotated[float, Field(ge=0)] = 0.0
    """Seconds without a call after which the model is scaled to zero. Needs `min: 0`. 0: never."""

    @model_validator(mode="after")
    def _ordered(self) -> Replicas:
        if self.max is not None and self.max < self.min:
            raise ValueError(f"max ({self.max}) is below min ({self.min})")
        if self.idle_s > 0 and self.min > 0:
            raise ValueError("idle_s is for scaling to zero, which needs min: 0; set it, or remove idle_s")
        return self


class Gpu(Section):
    """A GPU type that a model may run on, with the settings that differ there."""

    type: Annotated[str, Field(min_length=1)]
    """Ray's accelerator type."""
    tensor_parallel_size: Annotated[int, Field(ge=1, le=64)] | None = None
    """GPUs of one tensor-parallel group on this type. None: the model's."""
    pipeline_parallel_size: Annotated[int, Field(ge=1, le=64)] | None = None
    """Pipeline stages on this type. None: the model's."""
    engine: Mapping[str, Any] = Field(default_factory=dict)
    """Engine arguments on this type, added to the model's."""


class Rollback(Section):
    """Automatic rollback of a canary whose error rate or time to first token is too high.

    Each value is the allowed ratio to the stable version; 0: never roll back."""

    error_ratio: Annotated[float, Field(ge=0, le=1000)] = 1.5
    """Allowed ratio of error rates, canary to stable version: 0 (never roll back), or 1 or more."""
    ttft_ratio: Annotated[float, Field(ge=0, le=1000)] = 1.2
    """Allowed ratio of times to first token, canary to stable version: 0 (never roll back), or 1 or more."""

    @field_validator("error_ratio", "ttft_ratio")
    @classmethod
    def _more(cls, value: float) -> float:
        if 0 < value < 1:
            raise ValueError(f"{value:g} would roll back a version that is better: must be at least 1, or 0 for never")
        return value


class Canary(Section):
    """A second version of a model, which gets the share `weight` of its calls. Keys left out are the model's."""

    version: str
    """Name of the second version; another than the model's."""
    weight: Annotated[float, Field(ge=0, le=1)] = 0.05
    """Share of the model's calls that the canary gets."""
    rollback: Rollback = Rollback()
    source: Annotated[str, Field(min_length=1)] | None = None
    """Source of the weights. None: the model's."""
    revision: str | None = None
    """Revision of an `hf://` source. None: the model's."""
    digest: Annotated[str, Field(pattern=r"^(sha256:[0-9a-f]{64})?$")] = ""
    """Digest of the canary's weights, `sha256:` and 64 hex digits; empty: not compared."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] | None = None
    """Data type of the weights. None: the model's."""
    tensor_parallel_size: Annotated[int, Field(ge=1, le=64)] | None = None
    """GPUs of one tensor-parallel group. None: the model's."""
    pipeline_parallel_size: Annotated[int, Field(ge=1, le=64)] | None = None
    """Pipeline stages. None: the model's."""
    max_model_len: Annotated[int, Field(ge=1)] | None = None
    """Longest context in tokens. None: the model's."""
    engine: Mapping[str, Any] | None = None
    """Engine arguments, instead of the model's. None: the model's."""
    ray: str | None = None
    """Name of a Ray cluster. None: the model's."""

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
        """Return the model's keys that the canary overrides, with the canary's values."""
        set_keys = self.model_dump(exclude_unset=True, exclude={"weight", "rollback"})
        return {key: value for key, value in set_keys.items() if value is not None} | {"digest": self.digest}


def _checked_name(value: str) -> str:
    if not _NAME.fullmatch(value):
        raise ValueError(f"{value!r} {_NAME_RULE}")
    return value


class SloSettings(Section):
    """Service level objective, which scaling aims at.

    For a share `target` of the calls, the first token arrives within `ttft_s` and the others `itl_s` apart on average.
    """

    ttft_s: Annotated[float, Field(gt=0, le=3600)] = 2.0
    """Time to the first token, in seconds."""
    itl_s: Annotated[float, Field(gt=0, le=60)] = 0.1
    """Mean time between the later tokens of a call, in seconds."""
    target: Annotated[float, Field(gt=0, lt=1)] = 0.99
    """Share of the calls that meet both times."""


class Scaling(Section):
    """Scaling of replicas by demand.

    `gpu_budget`: GPUs that all models together may use, by type ("" for models without a type); a type that is not
    listed is unlimited. `cold_start_s`: assumed start time of a model until its own has been measured. `forecast`:
    scale before expected demand arrives. `frozen`: no automatic changes.
    """

    gpu_budget: Mapping[str, Annotated[int, Field(ge=0)]] = Field(default_factory=dict)
    """GPUs that all models together may use, by type; the key "" is for models without a type."""
    cold_start_s: Annotated[float, Field(gt=0, le=86_400)] = 60.0
    """Assumed start time of a model in seconds, until its own has been measured."""
    forecast: bool = True
    """Scale before expected demand arrives. Only true is supported."""
    frozen: bool = False
    """Change no number of replicas automatically."""

    @field_validator("forecast")
    @classmethod
    def _ahead(cls, value: bool) -> bool:
        if not value:
            raise ValueError("false is not supported: scaling always acts on the forecast; remove the key")
        return value


class Model(Section):
    """A model. `engine` has vLLM's argument names. `gpu`: one type, or a list with the preferred type first."""

    name: str
    """Name that callers use: 1 to 63 lower-case letters, digits, `.`, `_` or `-`."""
    aliases: tuple[str, ...] = ()
    """Further names: 1 to 128 letters, digits, `.`, `_`, `-`, `/`, `:`, `@` or `+`."""
    source: Annotated[str, Field(min_length=1)]
    """Folder, `hf://organisation/name`, `s3://`, `gs://`, `https://`, `demo://smollm2` or `demo://minilm`."""
    version: str = "v1"
    """Name of this version, of the same form as `name`."""
    revision: str = ""
    """Branch, tag or commit of an `hf://` source."""
    digest: Annotated[str, Field(pattern=r"^(sha256:[0-9a-f]{64})?$")] = ""
    """Digest of the weights, `sha256:` and 64 hex digits; other weights are refused. Empty: not compared."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Data type of the weights, by vLLM's name."""
    tensor_parallel_size: Annotated[int, Field(ge=1, le=64)] = 1
    """GPUs of one tensor-parallel group."""
    pipeline_parallel_size: Annotated[int, Field(ge=1, le=64)] = 1
    """Pipeline stages."""
    max_model_len: Annotated[int, Field(ge=1)] | None = None
    """Longest context in tokens. None: the engine's default."""
    replicas: Replicas = Replicas()
    gpu: str | tuple[Gpu, ...] = ""
    """Ray's accelerator type, or a list of types, the preferred one first; empty: any type."""
    slo: SloSettings = SloSettings()
    engine: Mapping[str, Any] = Field(default_factory=dict)
    """More engine arguments by vLLM's names. Arguments that have a key of their own are refused."""
    ray: str = ""
    """Name of a Ray cluster of `ray`; empty: the first one."""
    license: str = ""
    """License where the model card names none."""
    fallback: tuple[str, ...] = ()
    """Models that take the calls while this one has no ready worker, in this order."""
    canary: Canary | None = None
    """None: one version."""
    allow_cross_node_tensor_parallel: bool = False
    """Whether a tensor-parallel group may span nodes."""
    trust_remote_code: bool = False
    """Whether the engine may run the model's own code. Needs `weights.allow.remote_code`."""
    load_format: str = "safetensors"
    """vLLM's name of the weights' format. Must be listed in `weights.allow.formats`."""
    adapters: tuple[Adapter, ...] | None = None
    """LoRA adapters: a list, or a mapping from the name to the other keys. An empty list lets adapters be loaded at run
    time. None: the engine takes no adapters, unless `engine.enable_lora` is true."""
    control_tokens_in_content: Literal["keep", "escape"] = "keep"
    """What becomes of control tokens, such as `<|im_end|>`, in contents of users, tool results and documents. `keep`:
    they become control tokens, as with vLLM and transformers. `escape`: they stay text, with a space after the first
    character."""

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
        types = [] if isinstance(value, str) else [gpu.type for gpu in value]
        if not isinstance(value, str) and not types:
            raise ValueError("is an empty list: name a type, or remove the key for any type")
        if len(set(types)) < len(types):
            raise ValueError(f"names a type twice: {', '.join(types)}")
        return value

    @field_validator("adapters", mode="before")
    @classmethod
    def _listed(cls, value: Any) -> Any:
        return as_list(value)

    @field_validator("adapters")
    @classmethod
    def _distinct(cls, value: tuple[Adapter, ...] | None) -> tuple[Adapter, ...] | None:
        raise_all(duplicates(value or ()))
        return value

    @model_validator(mode="after")
    def _takes_adapters(self) -> Model:
        if self.adapters is not None and self.engine.get("enable_lora") is False:
            raise_all([Problem(("engine", "enable_lora"), "is false, but the model has `adapters`: remove one")])
        known = [self.version, *([self.canary.version] if self.canary is not None else [])]
        raise_all(
            Problem(("adapters", at, "version"), f"{adapter.version!r} is no version here; there is {', '.join(known)}")
            for at, adapter in enumerate(self.adapters or ())
            if adapter.version and adapter.version not in known
        )
        return self

    @property
    def takes_adapters(self) -> bool:
        """Whether the engine of the model can load adapters."""
        return self.adapters is not None or self.engine.get("enable_lora") is True

    def adapter_specs(self) -> tuple[AdapterSpec, ...]:
        """Return the adapters of the entry."""
        return tuple(adapter.spec() for adapter in self.adapters or ())

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
        """Yield (path, source of the weights, arguments of the section, all arguments of the engine) for every
        `engine:` section of the entry."""

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
        canary = self.canary
        if canary is not None and canary.engine is not None:
            length = canary.max_model_len or self.max_model_len
            yield (
                ("canary", "engine"),
                canary.source or self.source,
                canary.engine,
                whole(canary.engine, canary.tensor_parallel_size, length),
            )

    def versions(self) -> tuple[Model, ...]:
        """Return the model without the canary, followed by the canary (if there is one) as a separate Model.

        The result does not say which share of the calls each version gets; specs() adds it.
        """
        plain = self.model_copy(update={"canary": None})
        if self.canary is None:
            return (plain,)
        return plain, plain.model_copy(update=self.canary.own())

    def specs(self) -> tuple[ModelSpec, ...]:
        """Return one ModelSpec for each version and GPU type. The stable version comes first; within a version, the
        preferred GPU type comes first."""
        canary_weight = self.canary.weight if self.canary is not None else 0.0
        rollback = self.canary.rollback if self.canary is not None else Rollback(error_ratio=0, ttft_ratio=0)
        specs: list[ModelSpec] = []
        for number, version in enumerate(self.versions()):
            ratios = (rollback.error_ratio, rollback.ttft_ratio) if number else (0.0, 0.0)
            spec = replace(
                version.spec(),
                weight=canary_weight if number else 1.0 - canary_weight,
                error_ratio=ratios[0],
                ttft_ratio=ratios[1],
            )
            choices = () if isinstance(version.gpu, str) else version.gpu
            specs += [_spec_on(spec, choice) for choice in choices] or [spec]
        return tuple(specs)

    def spec(self) -> ModelSpec:
        """Return the entry as a ModelSpec. The canary, and settings that apply to one GPU type only, are left out;
        specs() adds them."""
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
            engine=engine_with_lora(self.engine) if self.takes_adapters else dict(self.engine),
            allow_cross_node_tensor_parallel=self.allow_cross_node_tensor_parallel,
            trust_remote_code=self.trust_remote_code,
            load_format=self.load_format,
            control_tokens_in_content=self.control_tokens_in_content,
            digest=self.digest,
            license=self.license.lower(),
            ray=self.ray,
            fallback=self.fallback,
        )


def _spec_on(spec: ModelSpec, choice: Gpu) -> ModelSpec:
    return replace(
        spec,
        gpu=choice.type,
        tensor_parallel_size=choice.tensor_parallel_size or spec.tensor_parallel_size,
        pipeline_parallel_size=choice.pipeline_parallel_size or spec.pipeline_parallel_size,
        engine={**spec.engine, **choice.engine},
    )


_EXPOSURE = {
    "auth": "any caller that reaches it could use every model",
    "gateway.tls": "API keys would be sent unencrypted",
    "auth and gateway.tls": "any caller that reaches it could use every model, and requests would be sent unencrypted",
}


class Config(Section):
    """A complete cluster.yaml."""

    api_version: Literal["headrace/v1"]
    """Version of this file's format."""
    name: Annotated[str, Field(pattern=_NAME.pattern)]
    """Name of the cluster, on each metric and log line: 1 to 63 lower-case letters, digits, `.`, `_` or `-`."""
    gateway: GatewaySettings = GatewaySettings()
    link: LinkSettings = LinkSettings()
    routing: Routing = Routing()
    ray: tuple[RayCluster, ...] = ()
    weights: Weights = Weights()
    observe: Observe = Observe()
    models: tuple[Model, ...]
    auth: Auth | None = None
    store: Store = Store()
    cost: Cost | None = None
    scaling: Scaling = Scaling()
    classes: tuple[PriorityClass, ...] = CLASSES
    tenant_defaults: TenantDefaults = TenantDefaults()
    tenants: tuple[Tenant, ...] = ()

    def _authentication_problems(self) -> Iterator[Problem]:
        yield from problems_together(self.auth, self.classes, self.tenant_defaults, self.tenants)
        gateway, auth = self.gateway, self.auth
        if self.observe.budget_webhook is not None and auth is None:
            yield Problem(("observe", "budget_webhook"), "without auth there are no tenants and no budgets: set auth")
        for listener in ("grpc", "http", "admin"):
            address = getattr(gateway.listen, listener)
            missing = " and ".join(
                name for name, section in (("auth", auth), ("gateway.tls", gateway.tls)) if section is None
            )
            if missing and not is_loopback(address):
                text = (
                    f"is {address}, off loopback, without {missing}: {_EXPOSURE[missing]}. "
                    "Set both auth and gateway.tls, or listen on 127.0.0.1"
                )
                yield Problem(("gateway", "listen", listener), text)
        if gateway.console.oidc is not None:
            known = [issuer.issuer for issuer in auth.oidc] if auth is not None else []
            if gateway.console.oidc.issuer not in known:
                text = f"is none of auth.oidc ({', '.join(known) or 'none'}), which says where tokens name the tenant"
                yield Problem(("gateway", "console", "oidc", "issuer"), text)
        if auth is not None and auth.client_certificates and (gateway.tls is None or not gateway.tls.client_ca_file):
            text = "client certificates could not be verified: set gateway.tls.client_ca_file"
            yield Problem(("auth", "client_certificates"), text)
        if auth is not None and self.ray and auth.cluster_secret_file is None:
            text = "with a Ray cluster in `ray` all gateways need the same secret: name a file that all have"
            yield Problem(("auth", "cluster_secret_file"), text)

    def policies(self) -> tuple[TenantPolicy, ...]:
        """Return the complete policies of the tenants that this file declares."""
        return tuple(tenant.policy(self.tenant_defaults) for tenant in self.tenants)

    @model_validator(mode="after")
    def _check_sections(self, info: ValidationInfo) -> Config:
        absent = (info.context or {}).get("absent", ())
        raise_all(
            (
                *self._authentication_problems(),
                *checks.names(self.models),
                *name_conflicts([((model.name, *model.aliases), model.adapters or ()) for model in self.models]),
                *checks.fallbacks(self.models, absent),
                *self._disallowed(),
                *checks.budgets([*self._gpu_needs()], self.scaling.gpu_budget),
            )
        )
        return self

    def _disallowed(self) -> Iterator[Problem]:
        """Yield a problem for each setting of a model that `weights.allow` or `ray` does not permit."""
        allow, rays = self.weights.allow, [ray.name for ray in self.ray]
        for at, model in enumerate(self.models):
            where: KeyPath = ("models", at)
            if model.trust_remote_code and not allow.remote_code:
                text = "is true but weights.allow.remote_code is false: set both, or remove this key"
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
            for number, adapter in enumerate(model.adapters or ()):
                if not _is_allowed(adapter.source, allow):
                    yield Problem((*where, "adapters", number, "source"), _not_allowed(adapter.source, allow))
            if not allow.remote_code:
                for path, source, engine, _ in model.engines():
                    if not source.startswith("sim://"):
                        yield from checks.code_of((*where, *path), engine)
            for number, version in enumerate(model.versions()):
                of_version: KeyPath = (*where, "canary") if number else where
                if not _is_allowed(version.source, allow):
                    yield Problem((*of_version, "source"), _not_allowed(version.source, allow))
                if version.source.startswith("hf://") and _NO_REVISION.search(version.revision):
                    text = f"{version.revision!r} is no branch, tag or commit: it has whitespace, '\\' or one of ~^:?*["
                    yield Problem((*of_version, "revision"), text)
                if version.ray and version.ray not in rays:
                    text = f"there is no Ray cluster {version.ray!r}; ray has {', '.join(rays) or 'none'}"
                    yield Problem((*of_version, "ray"), text)

    def _gpu_needs(self) -> Iterator[checks.Need]:
        for at, model in enumerate(self.models):
            if model.source.startswith("sim://"):
                continue
            for spec in model.model_copy(update={"canary": None}).specs():
                yield at, spec.gpu, spec.tensor_parallel_size * spec.pipeline_parallel_size, spec.min_replicas

    @field_validator("ray")
    @classmethod
    def _distinct(cls, value: tuple[RayCluster, ...]) -> tuple[RayCluster, ...]:
        if len({ray.name for ray in value}) < len(value):
            raise ValueError("two entries have the same name")
        urls = [ray.dashboard_url.rstrip("/").lower() for ray in value]
        if twice := next((url for at, url in enumerate(urls) if url in urls[:at]), ""):
            raise ValueError(f"two entries have the dashboard_url {twice}: one Ray cluster is one entry")
        return value


def _is_allowed(source: str, allow: Allow) -> bool:
    return is_allowed_source(source, allow.sources)


def _not_allowed(source: str, allow: Allow) -> str:
    return f"{source!r} is not among weights.allow.sources ({', '.join(allow.sources)})"


def parse(text: str, where: str = "configuration") -> Config:
    """Read and check the text of a cluster.yaml. Raises ConfigError with the path of every wrong key."""
    document = read_document(text, where)
    config, wrong = examine(document)
    if config is None:
        raise ConfigError("\n".join(line(problem, where, document) for problem in wrong))
    return config


def read_document(text: str, where: str) -> Document:
    """Read the text of a cluster.yaml as YAML. Duplicate keys are accepted here. Raises ConfigError."""
    try:
        document = read(text)
    except NotYaml as error:
        raise ConfigError(f"{where}: {error}") from None
    if not isinstance(document.data, dict):
        raise ConfigError(f"{where}: expected a mapping that begins with `api_version: {API_VERSION}`")
    return document


def line(problem: Problem, where: str, document: Document) -> str:
    """Return a problem as one line of an error message, with the name of the file and the line number."""
    at = document.line_of(problem.path)
    return f"{where}: {problem}{f' (line {at})' if at else ''}"


def examine(document: Document, absent: Collection[str] = ()) -> tuple[Config | None, list[Problem]]:
    """Return the configuration in a document, or None if the document is invalid, and the problems of the document.

    `absent`: names of models that were left out of the document. Fallbacks may name these models.
    """
    config, wrong = without_invalid_keys(document, absent)
    return (None if wrong else config), wrong


def without_invalid_keys(document: Document, absent: Collection[str] = ()) -> tuple[Config | None, list[Problem]]:
    """Return the configuration in a document without the wrong keys, and all problems of the document.

    A wrong key hides problems elsewhere. Wrong keys are therefore removed, and the rest is checked again until it is
    valid. A model entry that stays invalid is replaced by a placeholder named LEFT_OUT followed by the entry's
    position.
    """
    zero_bytes = [*_zero_bytes((), document.data, set())]
    wrong = [_duplicate_problem(duplicate) for duplicate in document.duplicates]
    wrong += zero_bytes
    data: Any = without(document.data, [problem.path for problem in zero_bytes])
    removed: list[KeyPath] = []
    while data is not None and len(removed) < MAX_PROBLEMS:
        try:
            return Config.model_validate(data, context={"absent": {*absent, *names_of(document.data)}}), wrong
        except ValidationError as error:
            problems = problems_of(error, Config)
        wrong += [problem for problem in problems if problem not in wrong and not _follows(problem, removed)]
        removed += [problem.path for problem in problems]
        data = without(data, [problem.path for problem in problems])
    return None, wrong


def _zero_bytes(path: KeyPath, value: Any, seen: set[int]) -> Iterator[Problem]:
    """Yield a problem for each text with a zero byte, since file names and program arguments cannot contain one.

    `seen`: ids of the values that were checked already, since YAML aliases may repeat a value.
    """
    if isinstance(value, str) and "\0" in value:
        yield Problem(path, f"{shown(value)} holds a zero byte (\\0): take it out")
    if not isinstance(value, dict | list) or id(value) in seen:
        return
    seen.add(id(value))
    for key, item in value.items() if isinstance(value, dict) else enumerate(value):
        yield from _zero_bytes((*path, key if isinstance(key, str | int) else str(key)), item, seen)


MAX_PROBLEMS = 1000
_DEPENDS_ON_ALL = ("gateway", "auth", "classes", "tenants", "tenant_defaults", "ray", "observe")
_MODELS_DEPEND_ON = ("weights", "ray", "scaling")


def _duplicate_problem(key: Duplicate) -> Problem:
    text = f"the key appears again here, first in line {key.first_line}; only the last would count: keep one of them"
    return Problem(key.path, text)


def _follows(problem: Problem, removed: Sequence[KeyPath]) -> bool:
    """Return whether a problem may be only a consequence of the removal of the keys in `removed`."""
    if problem.missing and problem.path in removed:
        return True
    section = problem.path[0] if problem.path else ""
    sections = {path[0] for path in removed if path}
    if section in ("models", "scaling"):
        within = [path for path in removed if path[:2] == problem.path[:2] or problem.path[: len(path)] == path]
        return any(name in sections for name in _MODELS_DEPEND_ON) or (problem.missing and bool(within))
    return any(name in sections for name in _DEPENDS_ON_ALL)


def names_of(data: Any) -> set[str]:
    """Return the model names and aliases in a document's `models`. Names that cannot be read are left out."""
    entries = data.get("models") if isinstance(data, dict) else None
    names: set[str] = set()
    for entry in entries if isinstance(entries, list) else ():
        if isinstance(entry, dict):
            aliases = entry.get("aliases")
            names |= {
                name
                for name in (entry.get("name"), *(aliases if isinstance(aliases, list) else ()))
                if isinstance(name, str)
            }
    return names


def with_models(config: Config, entries: Sequence[Mapping[str, Any]], absent: Collection[str] = ()) -> Config:
    """Return the configuration with the models in `entries` instead of the models of `config`, checked as a whole.

    `absent` has the same meaning as for `examine`. Raises CallError, which names every wrong key with the model's name.
    """
    plain: dict[str, Any] = config.model_dump(mode="json", exclude_unset=True, by_alias=True)
    changed, wrong = examine(Document(plain | {"models": [dict(entry) for entry in entries]}), absent)
    if changed is None:
        names = [str(entry.get("name")) for entry in entries]
        violations = [Violation(_by_name(problem.where, names), problem.text) for problem in wrong]
        raise CallError(
            Outcome.INVALID_FIELD,
            "; ".join(f"{violation.field}: {violation.description}" for violation in violations),
            violations=violations,
        )
    return changed


def _by_name(where: str, names: Sequence[str]) -> str:
    """Return a path in which the model's position is replaced by the model's name."""
    return re.sub(r"^models\[(\d+)\]", lambda match: f"models[{names[int(match[1])]}]", where)


def entry_of(model: Model) -> dict[str, Any]:
    """Return a model's entry as plain values without defaults, so that equal models have equal entries."""
    plain: dict[str, Any] = model.model_dump(mode="json", exclude_defaults=True)
    return {"name": model.name, "source": model.source} | plain


def load(path: Path) -> Config:
    """Read and check a cluster.yaml. Raises ConfigError."""
    return parse(read_text(path), str(path))


def read_text(path: Path) -> str:
    """Return the text of a file. Raises ConfigError."""
    try:
        return path.read_text()
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: is not UTF-8: {error.reason} at byte {error.start}") from None


def secret_files(config: Config) -> Mapping[str, Path]:
    """Return the path of each secret file of `auth`, by the name of its setting. A path that is not configured is in
    the cache folder."""
    if config.auth is None:
        return {}
    files = {"auth.cluster_secret_file": config.auth.cluster_secret_file or cache_dir() / "cluster-secret"}
    if config.auth.api_keys is not None:
        pepper = config.auth.api_keys.pepper_file
        files["auth.api_keys.pepper_file"] = pepper or cache_dir() / "key-pepper"
    return files


def database_url(config: Config) -> str:
    """Return the URL of the ledger's database: the configured URL, else that of SQLite in the cache folder."""
    return config.store.database_url or f"sqlite:///{cache_dir() / 'ledger.db'}"


def cache_dir() -> Path:
    """Return the cache folder: HEADRACE_CACHE_DIR, else `headrace` in the user's cache folder.

    The cache folder holds models made on this host, tokenizer bundles and the last catalog.
    """
    configured = os.environ.get("HEADRACE_CACHE_DIR")
    if configured:
        return Path(configured)
    return Path(os.environ.get("XDG_CACHE_HOME", str(Path.home() / ".cache"))) / "headrace"
