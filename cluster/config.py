"""cluster.yaml: read once, checked when built, frozen; an unknown key is refused with its path.

Sections that later releases bring (autoscaling, ...) are refused by name rather than accepted and ignored: a bound
that nobody enforces is worse than none. Those about tenants are in config_tenants.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, ValidationError, field_validator, model_validator

from cluster.api.types import ModelSpec
from cluster.config_gateway import Gateway, Section, Tls, is_loopback
from cluster.config_tenants import (
    CLASSES,
    Auth,
    BudgetWebhook,
    Class,
    Cost,
    Store,
    Tenant,
    TenantDefaults,
    check_together,
)
from cluster.tenancy.policy import TenantPolicy

API_VERSION = "headrace/v1"

NOT_YET = {"scaling": "autoscaling"}
NOT_YET_MODEL = {
    "slo": "service level objectives",
    "canary": "canary releases",
    "adapters": "adapters",
    "fallback": "fallback models",
}

# Engine arguments that Headrace sets itself, with the reason a user is told.
OWNED_ENGINE_ARGS = {
    "model": "the entry's `source` says which weights are loaded",
    "tokenizer": "the tokenizer comes with the entry's `source`, so that the gateway and the engine agree",
    "revision": "set `revision` beside `source`",
    "dtype": "set `dtype` beside `source`",
    "tensor_parallel_size": "set `tensor_parallel_size` beside `source`; it also shapes the placement group",
    "pipeline_parallel_size": "set `pipeline_parallel_size` beside `source`; it also shapes the placement group",
    "max_model_len": "set `max_model_len` beside `source`",
    "trust_remote_code": "set `trust_remote_code` beside `source`; `weights.allow.remote_code` must agree",
    "load_format": "set `load_format` beside `source`; `weights.allow.formats` must agree",
    "distributed_executor_backend": "ranks are placed by Ray on the model's placement group",
    "data_parallel_size": "replicas are Ray Serve's: set `replicas`",
    "served_model_name": "the entry's `name` and `aliases` are the served names",
    "kv_events_config": "the worker publishes KV events over the link",
    "disable_log_stats": "the worker reads the scheduler's statistics for routing and metrics",
    "host": "a worker accepts no connections; it dials the gateways",
    "port": "a worker accepts no connections; it dials the gateways",
    "api_key": "callers are authenticated by the gateway",
    "scheduling_policy": "the gateway's fair queue decides; the engine runs with priority scheduling",
    "generation_config": "sampling defaults come from the model's own generation config",
    "skip_tokenizer_init": "the engine needs the tokenizer for grammars",
}

LinkAddress = Annotated[
    str, Field(pattern=r"^(srv://_[a-z0-9-]+\._tcp(\.[a-zA-Z0-9_-]+)+\.?|(\[[0-9a-fA-F:]+\]|[^:/\s]+):\d{1,5})$")
]
_NAME = re.compile(r"^[a-z0-9]([a-z0-9._-]{0,61}[a-z0-9])?$")


class ConfigError(ValueError):
    """The configuration is wrong; the message names the file, the key's path and the remedy."""


class Link(Section):
    """Read by those who dial: workers and the controller. Empty `gateways` means the local gateway's link port.

    An entry is `host:port`, or `srv://_link._tcp.NAME`: whoever the DNS names there, asked again every few seconds."""

    gateways: tuple[LinkAddress, ...] = ()
    tls: Tls | None = None


class RayCluster(Section):
    """A Ray cluster that exists already. Without any, `cluster up` starts a local one."""

    name: Annotated[str, Field(pattern=_NAME.pattern)]
    dashboard_url: Annotated[str, Field(pattern=r"^https?://")]
    address: str = ""
    token_file: Path | None = None


class HuggingFace(Section):
    """Where `hf://` sources come from; huggingface_hub's own settings otherwise."""

    endpoint: str = ""
    token_file: Path | None = None


class Allow(Section):
    """What may be loaded at all."""

    sources: tuple[str, ...] = ("*",)
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
    """Bounds on the number of replicas. Until the autoscaler exists max(min, 1) run, and `idle_s` is not used."""

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


class Model(Section):
    """One model. Engine words are vLLM's own."""

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
    gpu: str = ""
    engine: Mapping[str, Any] = Field(default_factory=dict)
    allow_cross_node_tensor_parallel: bool = False
    trust_remote_code: bool = False
    load_format: str = "safetensors"

    @field_validator("name", "version")
    @classmethod
    def _name(cls, value: str) -> str:
        if not _NAME.match(value):
            raise ValueError(f"{value!r} must be lower-case letters, digits, '.', '_' or '-', 1 to 63 characters")
        return value

    @field_validator("engine")
    @classmethod
    def _engine(cls, value: Mapping[str, Any]) -> Mapping[str, Any]:
        for key in value:
            if key in OWNED_ENGINE_ARGS:
                raise ValueError(f"engine.{key} is Headrace's: {OWNED_ENGINE_ARGS[key]}")
        return value

    def spec(self) -> ModelSpec:
        """The entry as the packages below see it."""
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
            gpu=self.gpu,
            engine=dict(self.engine),
            allow_cross_node_tensor_parallel=self.allow_cross_node_tensor_parallel,
            trust_remote_code=self.trust_remote_code,
            load_format=self.load_format,
            digest=self.digest,
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
    gateway: Gateway = Gateway()
    link: Link = Link()
    ray: tuple[RayCluster, ...] = ()
    weights: Weights = Weights()
    observe: Observe = Observe()
    models: tuple[Model, ...]
    auth: Auth | None = None
    store: Store = Store()
    cost: Cost | None = None
    classes: tuple[Class, ...] = CLASSES
    tenant_defaults: TenantDefaults = TenantDefaults()
    tenants: tuple[Tenant, ...] = ()

    @model_validator(mode="after")
    def _who_may_call(self) -> Config:
        check_together(self.auth, self.classes, self.tenant_defaults, self.tenants)
        gateway, auth = self.gateway, self.auth
        if self.observe.budget_webhook is not None and auth is None:
            raise ValueError("observe.budget_webhook: without auth there are no tenants and no budgets: set auth")
        for listener in ("grpc", "http", "admin"):
            address = getattr(gateway.listen, listener)
            lacks = " and ".join(
                name for name, there in (("auth", auth), ("gateway.tls", gateway.tls)) if there is None
            )
            if lacks and not is_loopback(address):
                raise ValueError(
                    f"gateway.listen.{listener} is {address}, off loopback, without {lacks}: {_WHY_NOT[lacks]}. "
                    "Set both auth and gateway.tls, or listen on 127.0.0.1"
                )
        if auth is not None and auth.client_certificates and (gateway.tls is None or not gateway.tls.client_ca_file):
            raise ValueError(
                "auth.client_certificates: nobody's certificate could be verified: set gateway.tls.client_ca_file"
            )
        if auth is not None and self.ray and auth.cluster_secret_file is None:
            raise ValueError(
                "auth.cluster_secret_file: with a Ray cluster of its own every gateway needs the same secret: name a "
                "file that all have"
            )
        return self

    def policies(self) -> tuple[TenantPolicy, ...]:
        """The tenants that this file declares, each whole."""
        return tuple(tenant.policy(self.tenant_defaults) for tenant in self.tenants)

    @model_validator(mode="after")
    def _together(self) -> Config:
        owner: dict[str, str] = {}
        for model in self.models:
            for name in (model.name, *model.aliases):
                if name in owner:
                    raise ValueError(f"models: the name {name!r} is used by {owner[name]!r} and {model.name!r}")
                owner[name] = model.name
            if model.trust_remote_code and not self.weights.allow.remote_code:
                raise ValueError(
                    f"models[{model.name}].trust_remote_code is true but weights.allow.remote_code is not: "
                    "both must say so"
                )
            if model.load_format not in self.weights.allow.formats:
                raise ValueError(
                    f"models[{model.name}].load_format: weights.allow.formats does not list {model.load_format!r}"
                )
        return self


def _path(location: tuple[int | str, ...]) -> str:
    out = ""
    for part in location:
        out += f"[{part}]" if isinstance(part, int) else f".{part}" if out else str(part)
    return out


def _refuse_not_yet(data: Mapping[str, Any], where: str) -> None:
    for key, what in NOT_YET.items():
        if key in data:
            raise ConfigError(f"{where}: {key}: {what}: not in this release; remove the section")
    models = data.get("models")
    for i, entry in enumerate(models if isinstance(models, list) else []):
        for key, what in NOT_YET_MODEL.items():
            if isinstance(entry, dict) and key in entry:
                raise ConfigError(f"{where}: models[{i}].{key}: {what}: not in this release; remove the key")


def parse(text: str, where: str = "configuration") -> Config:
    """Check a cluster.yaml. Raises ConfigError naming every wrong key by its path."""
    try:
        data = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{where}: not YAML: {error}") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{where}: expected a mapping that begins with `api_version: {API_VERSION}`")
    _refuse_not_yet(data, where)
    try:
        return Config.model_validate(data)
    except ValidationError as error:
        lines = []
        for problem in error.errors():
            path = _path(problem["loc"]) or "file"
            if problem["type"] == "extra_forbidden":
                lines.append(f"{where}: {path}: unknown key")
            else:
                lines.append(f"{where}: {path}: {problem['msg'].removeprefix('Value error, ')}")
        raise ConfigError("\n".join(lines)) from None


def load(path: Path) -> Config:
    """Read and check a file. Raises ConfigError."""
    try:
        text = path.read_text()
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    return parse(text, str(path))


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
