"""The key `models[].adapters`: the adapters that a model's workers load, and the engine arguments for adapters."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Final

from pydantic import Field, field_validator

from cluster.api.adapters import SEPARATOR, AdapterSpec
from cluster.config import checks
from cluster.config.problems import Path, Problem
from cluster.config.section import Section

MAX_ADAPTERS: Final = 1000
"""Number of adapters that one model may have. Each gateway sends all of them to each worker in one message."""
MAX_TENANTS: Final = 4096
"""Number of tenants that all adapters of a model may name together."""
ENGINE_DEFAULTS: Final[Mapping[str, int]] = {"max_loras": 8, "max_cpu_loras": 64, "max_lora_rank": 64}
_NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,62}[A-Za-z0-9])?")
_HUB_REVISION = re.compile(r"^(hf://[^@]+)@[A-Za-z0-9._/-]+$")
_NAME_RULE = (
    "must be letters, digits, '.', '_' or '-', 1 to 64 characters, with a letter or digit at both ends; callers use it "
    "after the model's name, as in `model:adapter`"
)


class Adapter(Section):
    """A LoRA adapter of a model. Callers name it `model:name`."""

    name: str
    """Name of the adapter: 1 to 64 letters, digits, `.`, `_` or `-`."""
    source: Annotated[str, Field(min_length=1, max_length=2048)]
    """Folder, `hf://organisation/name` or with `@revision`, `s3://`, `gs://` or `https://`."""
    digest: Annotated[str, Field(pattern=r"^((sha256:)?[0-9a-f]{64})?$")] = ""
    """Digest of the adapter's files, 64 hex digits as `headrace adapters check` prints them, also with `sha256:` before
    them; other files are refused. Empty: not compared."""
    tenants: tuple[Annotated[str, Field(min_length=1, max_length=63)], ...] = ()
    """Tenants that may use the adapter; empty: every tenant that may use the model."""
    pinned: bool = False
    """Whether the engine keeps the adapter in memory whatever others are used."""
    license: Annotated[str, Field(max_length=128)] = ""
    """License of the adapter, for the record."""
    version: str = ""
    """Version of the model to which the adapter belongs; empty: all versions."""

    @field_validator("name")
    @classmethod
    def _named(cls, value: str) -> str:
        return checked_name(value)

    @field_validator("source")
    @classmethod
    def _from(cls, value: str) -> str:
        if why := checks.source_problem(_HUB_REVISION.sub(r"\1", value)):
            raise ValueError(why)
        return value

    def spec(self) -> AdapterSpec:
        """Return the entry as an AdapterSpec."""
        return AdapterSpec(
            name=self.name,
            source=self.source,
            digest=self.digest.removeprefix("sha256:"),
            tenants=self.tenants,
            pinned=self.pinned,
            license=self.license,
            version=self.version,
        )


def checked_name(value: str) -> str:
    """Return the name of an adapter unchanged. Raises ValueError for an invalid name."""
    if not _NAME.fullmatch(value):
        raise ValueError(f"{value!r} {_NAME_RULE}")
    return value


def as_list(value: Any) -> Any:
    """Convert a mapping of adapters to a list. A key of the mapping is an adapter's name. A value is a mapping with the
    adapter's other keys, or only the adapter's source. Values of other types are returned unchanged."""
    if not isinstance(value, Mapping):
        return value
    return [
        {"name": name, **entry} if isinstance(entry, Mapping) else {"name": name, "source": entry}
        for name, entry in value.items()
    ]


def duplicates(adapters: Sequence[Adapter]) -> Iterator[Problem]:
    """Yield a problem for each adapter that has the name of an earlier adapter. Also yield a problem if there are too
    many adapters, or too many tenants in all adapters together."""
    seen: set[str] = set()
    for at, adapter in enumerate(adapters):
        if adapter.name in seen:
            yield Problem((at, "name"), f"two adapters are called {adapter.name!r}: rename one, or remove it")
        seen.add(adapter.name)
    yield from limit_problems(adapters)


def limit_problems(adapters: Sequence[Adapter | AdapterSpec]) -> Iterator[Problem]:
    """Yield a problem if there are too many adapters, or too many tenants in all adapters together."""
    if (tenants := sum(len(adapter.tenants) for adapter in adapters)) > MAX_TENANTS:
        yield Problem((), f"names {tenants} tenants in all; at most {MAX_TENANTS} are allowed")
    if len(adapters) > MAX_ADAPTERS:
        yield Problem((), f"has {len(adapters)} adapters; at most {MAX_ADAPTERS} are allowed")


def without_surplus(configured: Sequence[AdapterSpec], loaded: Sequence[AdapterSpec]) -> tuple[AdapterSpec, ...]:
    """Return the adapters in `loaded` that a model can have beside its `configured` adapters. An adapter that would
    exceed MAX_ADAPTERS or MAX_TENANTS together with the adapters before it is left out."""
    kept: list[AdapterSpec] = []
    tenants = sum(len(adapter.tenants) for adapter in configured)
    for adapter in loaded:
        if len(configured) + len(kept) < MAX_ADAPTERS and tenants + len(adapter.tenants) <= MAX_TENANTS:
            kept.append(adapter)
            tenants += len(adapter.tenants)
    return tuple(kept)


def engine_with_lora(engine: Mapping[str, Any]) -> dict[str, Any]:
    """Return `engine` with the arguments that enable LoRA. Arguments that are already set are not changed."""
    defaults, slots = dict(ENGINE_DEFAULTS), engine.get("max_loras", 0)
    if isinstance(slots, int) and slots > defaults["max_cpu_loras"]:  # the memory must hold all slots' adapters
        defaults["max_cpu_loras"] = slots
    return {"enable_lora": True, **defaults, **engine}


def name_conflicts(models: Sequence[tuple[Sequence[str], Sequence[Adapter]]]) -> Iterator[Problem]:
    """Yield a problem for each adapter whose full name (`model:adapter`) is also a name or alias of a model.

    `models`: the names and the adapters of each model."""
    taken = {name for names, _ in models for name in names if SEPARATOR in name}
    for at, (names, adapters) in enumerate(models):
        for number, adapter in enumerate(adapters):
            if full := next((full for name in names if (full := f"{name}{SEPARATOR}{adapter.name}") in taken), ""):
                where: Path = ("models", at, "adapters", number, "name")
                yield Problem(where, f"{full!r} is also a name of a model: rename the adapter or the alias")
