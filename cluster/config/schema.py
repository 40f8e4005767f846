"""The schema of cluster.yaml. The file is read once, checked completely, then frozen.

Unknown keys are refused, even if a later release knows them. Otherwise this release could accept a limit that it does
not enforce, which is worse than an error. The error names the path of the key. Larger sections have modules of their
own: model.py, gateway.py, tenants.py and routing.py. document.py reads the text of a file.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, ValidationInfo, field_validator, model_validator

from cluster.config import checks
from cluster.config.adapters import name_conflicts
from cluster.config.gateway import GatewaySettings, Tls, check_address, is_loopback
from cluster.config.model import NAME, Model
from cluster.config.problems import Path as KeyPath
from cluster.config.problems import Problem, raise_all
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
from cluster.policy.catalog.allowed_sources import is_allowed_source
from cluster.policy.routing.gateway_subset import ALL_UP_TO
from cluster.policy.tenants.policy import TenantPolicy

API_VERSION = "headrace/v1"
_NO_REVISION = re.compile(r"[\s~^:?*\[\\]")
LinkAddress = Annotated[
    str,
    Field(pattern=r"^(srv://_[a-z0-9-]+\._tcp(\.[a-zA-Z0-9_-]+)+\.?|(\[[0-9a-fA-F:]+\]|[^:/\s]+):[0-9]{1,5})$"),
    AfterValidator(lambda value: value if value.startswith("srv://") else check_address(value, least=1)),
]


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

    name: Annotated[str, Field(pattern=NAME.pattern)]
    """Name to which `models[].ray` refers."""
    dashboard_url: Annotated[str, Field(pattern=r"^https?://"), AfterValidator(_web_server)]
    """URL of Ray's dashboard, which has the job API."""
    address: str = ""
    """Not used."""
    token_file: Path | None = None
    """File with the token of Ray's API."""


class HuggingFace(Section):
    """Server and token for `hf://` sources. By default, huggingface_hub's own server and token are used."""

    endpoint: Annotated[str, AfterValidator(lambda value: _web_server(value) if value else value)] = ""
    """URL of a mirror; empty: the URL that huggingface_hub uses."""
    token_file: Path | None = None
    """File with the token for gated repositories."""


class Allow(Section):
    """Rules for the weights that models may load. If `licenses` is empty, a model may have any license or none."""

    sources: tuple[str, ...] = ("*",)
    """Globs of the sources that models may name."""
    licenses: tuple[str, ...] = ()
    """Licenses that models may have; empty: any, or none."""
    formats: tuple[str, ...] = ("safetensors",)
    """Values that `models[].load_format` may have."""
    remote_code: bool = False
    """Whether models may run code of their own (`models[].trust_remote_code`)."""


class Weights(Section):
    """Settings of model weights: the folder for weights on each node, the Hugging Face server, and the rules for what
    models may load."""

    cache_dir: Path | None = None
    """Folder of weights on each node. None: `HEADRACE_CACHE_DIR`, else `headrace` in the user's cache folder."""
    hugging_face: HuggingFace = HuggingFace()
    allow: Allow = Allow()


class AccessLogSettings(Section):
    """The access log: one line for each call that has ended, as the event `call.ended`. `sample_ratio` leaves out only
    calls that went well; failed and resumed calls are always logged."""

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


_EXPOSURE = {
    "auth": "any caller that reaches it could use every model",
    "gateway.tls": "API keys would be sent unencrypted",
    "auth and gateway.tls": "any caller that reaches it could use every model, and requests would be sent unencrypted",
}


class Config(Section):
    """A complete cluster.yaml."""

    api_version: Literal["headrace/v1"]
    """Version of this file's format."""
    name: Annotated[str, Field(pattern=NAME.pattern)]
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
