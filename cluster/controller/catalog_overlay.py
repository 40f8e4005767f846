"""The file with the operators' changes to the catalog of the configuration file."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import structlog

from cluster.api.adapters import AdapterSpec
from cluster.policy.catalog.versions import VersionOverride
from cluster.process.private_files import replace_file

log = structlog.get_logger("catalog")


@dataclass(frozen=True, slots=True)
class CatalogOverlay:
    """Changes to the catalog of the configuration file. `models`: entries of models. `overrides`: overrides of
    versions, by model and version. `adapters`: adapters that were loaded at run time, by model."""

    models: Sequence[Mapping[str, Any]] = ()
    overrides: Mapping[str, Mapping[str, VersionOverride]] = field(default_factory=dict)
    adapters: Mapping[str, tuple[AdapterSpec, ...]] = field(default_factory=dict)


class CatalogOverlayFile:
    """The file with the catalog overlay: the changes that operators have made to the catalog at runtime.

    The next controller of the same cluster reads this file. `life`: the instance id of a local cluster; "" for other
    clusters. A file with another instance id is ignored. `on_stored` is called after each change of the file.
    """

    def __init__(self, path: Path, life: str, on_stored: Callable[[], None] = lambda: None) -> None:
        self._path = path
        self._life = life
        self._on_stored = on_stored

    def read(self) -> CatalogOverlay | None:
        """Return the stored overlay. None if the file is missing or unreadable, or was written for another instance of
        the cluster."""
        try:
            values = json.loads(self._path.read_text())
            if values["life"] != self._life:
                return None
            overrides = {
                model: {version: VersionOverride.from_json(override) for version, override in versions.items()}
                for model, versions in values["marks"].items()
            }
            numbers = values.get("load_numbers", {})  # older releases write neither these nor adapters
            adapters = {
                model: tuple(_adapter_from_json(adapter, numbers.get(model, {})) for adapter in of_model)
                for model, of_model in values.get("adapters", {}).items()
            }
            return CatalogOverlay(values["models"], overrides, adapters)
        except FileNotFoundError:
            return None
        except (OSError, ValueError, AttributeError, KeyError, TypeError) as error:
            log.warning("catalog.copy_not_read", path=str(self._path), reason=str(error))
            return None

    def keep(self, overlay: CatalogOverlay) -> None:
        """Replace the content of the file atomically with `overlay`. Raises OSError."""
        overrides = {
            model: {version: override.as_json() for version, override in versions.items()}
            for model, versions in overlay.overrides.items()
        }
        values: dict[str, Any] = {
            "life": self._life,
            "models": [dict(entry) for entry in overlay.models],
            "marks": overrides,
        }
        if overlay.adapters:
            values["adapters"] = {
                model: [adapter.as_entry() for adapter in adapters] for model, adapters in overlay.adapters.items()
            }
            values["load_numbers"] = {  # apart, because older releases refuse adapters with further keys
                model: {adapter.name: adapter.load_number for adapter in adapters}
                for model, adapters in overlay.adapters.items()
            }
        replace_file(self._path, json.dumps(values, indent=1))
        self._on_stored()


def _adapter_from_json(values: Mapping[str, Any], numbers: Mapping[str, int]) -> AdapterSpec:
    number = numbers.get(values["name"], 0)
    return AdapterSpec(**{**values, "tenants": tuple(values["tenants"]), "load_number": number})
