"""The schema of a model in cluster.yaml: its weights, engine, replicas, canary and objectives."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from cluster.api.adapters import AdapterSpec
from cluster.api.types import MAX_INT32, ModelSpec
from cluster.config import checks
from cluster.config.adapters import Adapter, as_list, duplicates, engine_with_lora
from cluster.config.problems import Path as KeyPath
from cluster.config.problems import Problem, raise_all
from cluster.config.section import Section

NAME = re.compile(r"^[a-z0-9]([a-z0-9._-]{0,61}[a-z0-9])?$")
_NAME_RULE = "must be lower-case letters, digits, '.', '_' or '-', 1 to 63 characters"
# Aliases allow the names that callers already use, such as meta-llama/Llama-3.1-8B-Instruct or
# claude-3-5-haiku@20241022.
_ALIAS = re.compile(r"[A-Za-z0-9@]([A-Za-z0-9._:/@+-]{0,126}[A-Za-z0-9+])?")
_ALIAS_RULE = "must be letters, digits, '.', '_', '-', '/', ':', '@' or '+', 1 to 128 characters"


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
    """A GPU type that a model may run on, with the settings that differ from the model's on this type."""

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
    """A second version of a model, which gets the share `weight` of its calls. A key that is left out has the model's
    value."""

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
    max_model_len: Annotated[int, Field(ge=1, le=MAX_INT32)] | None = None
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
    if not NAME.fullmatch(value):
        raise ValueError(f"{value!r} {_NAME_RULE}")
    return value


class SloSettings(Section):
    """A call meets the SLO if its first token arrives within `ttft_s`, and the mean time between its later tokens is at
    most `itl_s`. At least the share `target` of the calls should meet the SLO."""

    ttft_s: Annotated[float, Field(gt=0, le=3600)] = 2.0
    """Time to the first token, in seconds."""
    itl_s: Annotated[float, Field(gt=0, le=60)] = 0.1
    """Mean time between the later tokens of a call, in seconds."""
    target: Annotated[float, Field(gt=0, lt=1)] = 0.99
    """Share of the calls that meet both times."""


class SamplingDefaults(Section):
    """Values for calls that do not set the field, by the request's names. A key that is left out has the value of the
    model's generation_config.json, else vLLM's default."""

    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    """Randomness; 0 takes the likeliest token."""
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    """Share of the probability that the candidate tokens have together."""
    top_k: Annotated[int, Field(ge=-1, le=MAX_INT32)] | None = None
    """Number of candidate tokens; 0 or -1: all."""
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    """Least probability of a candidate, relative to the likeliest token's."""
    repetition_penalty: Annotated[float, Field(gt=0, le=1e6)] | None = None
    """Above 1: tokens of the prompt and the answer become less likely."""
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    """Above 0: tokens of the answer become less likely."""
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    """Above 0: tokens of the answer become less likely with each occurrence."""
    max_tokens: Annotated[int, Field(ge=1, le=MAX_INT32)] | None = None
    """Longest answer in tokens."""

    def values(self) -> dict[str, float]:
        """Return the values that are set, by name."""
        return self.model_dump(exclude_none=True)


class Model(Section):
    """A model in cluster.yaml. `engine`: vLLM's engine arguments, by vLLM's names. `gpu`: one GPU type, or a list with
    the preferred type first."""

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
    max_model_len: Annotated[int, Field(ge=1, le=MAX_INT32)] | None = None
    """Longest context in tokens. None: the engine's default."""
    replicas: Replicas = Replicas()
    gpu: str | tuple[Gpu, ...] = ""
    """Ray's accelerator type, or a list of types, the preferred one first; empty: any type."""
    slo: SloSettings = SloSettings()
    sampling: SamplingDefaults = SamplingDefaults()
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
        """Yield a tuple for every `engine:` section of the entry: the path of the section, the source of the weights,
        the arguments in the section, and all arguments of the engine, including those from other parts of the entry."""

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
            sampling=self.sampling.values(),
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
