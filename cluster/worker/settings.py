"""What a replica is started with, as frozen values that survive a trip through JSON and a pickle. No Ray here."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from cluster.api.types import ModelSpec
from cluster.policy.catalog import specs
from cluster.policy.catalog.reconcile import app_name
from cluster.wire.tls import TlsFiles

_REFUSED = "headrace-refused"
_REFUSAL = re.compile(_REFUSED + r'("(?:[^"\\]|\\.)*")')


class ModelRefused(Exception):
    """The entry cannot work as it stands: another try would fail alike. The reason is told to the user.

    Its text carries the reason as a JSON string behind a mark, so that `refusal_in` finds it again in whatever Ray
    wraps around it on the way to the controller.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(_REFUSED + json.dumps(reason))
        self.reason = reason

    def __reduce__(self) -> tuple[type[ModelRefused], tuple[str]]:
        return ModelRefused, (self.reason,)


def refusal_in(text: str) -> str:
    """The reason of the last ModelRefused told in `text`, or ""."""
    marks = _REFUSAL.findall(text)
    return str(json.loads(marks[-1])) if marks else ""


@dataclass(frozen=True, slots=True)
class ReplicaSettings:
    """`spec` and its surroundings. Paths are paths on the replica's node; `environment` is added to the process."""

    spec: ModelSpec
    cluster: str
    gateways: tuple[str, ...] = ()
    ray_cluster: str = "local"
    tls: TlsFiles | None = None
    cache_dir: str = ""
    hugging_face_endpoint: str = ""
    hugging_face_token_file: str = ""
    allowed_sources: tuple[str, ...] = ("*",)
    allowed_formats: tuple[str, ...] = ("safetensors",)
    allowed_licenses: tuple[str, ...] = ()
    allow_remote_code: bool = False
    drain_timeout_s: float = 2.0
    replicas: int | None = None
    """How many to begin with; None: as the spec says."""
    environment: Mapping[str, str] = field(default_factory=dict)

    def surroundings(self) -> dict[str, object]:
        """All but the spec that a replica has to be made anew for, as JSON values."""
        return {
            "cluster": self.cluster,
            "gateways": list(self.gateways),
            "ray_cluster": self.ray_cluster,
            "tls": _tls_to_json(self.tls),
            "cache_dir": self.cache_dir,
            "hugging_face_endpoint": self.hugging_face_endpoint,
            "hugging_face_token_file": self.hugging_face_token_file,
            "allow_remote_code": self.allow_remote_code,
            "drain_timeout_s": self.drain_timeout_s,
            "environment": dict(self.environment),
        }

    def to_json(self) -> dict[str, object]:
        """Plain JSON values; `from_json` is the inverse."""
        return {**self.surroundings(), **self._rules(), "spec": specs.to_json(self.spec)}

    def _rules(self) -> dict[str, object]:
        """What is looked at when replicas start, and makes none anew."""
        return {
            "allowed_sources": list(self.allowed_sources),
            "allowed_formats": list(self.allowed_formats),
            "allowed_licenses": list(self.allowed_licenses),
            "replicas": self.replicas,
        }

    @property
    def digest(self) -> str:
        """Changes when a replica has to be made anew."""
        return specs.digest(self.spec, self.surroundings())

    @property
    def app(self) -> str:
        """The name of its application, without the cluster's."""
        return app_name(self.spec.name, self.spec.version, self.digest)


def from_json(values: Mapping[str, object]) -> ReplicaSettings:
    """What `ReplicaSettings.to_json` wrote. Raises ValueError or TypeError for anything else."""
    plain = {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
    spec, tls = plain.pop("spec", None), plain.pop("tls", None)
    if not isinstance(spec, Mapping):
        raise ValueError("settings: spec must be an object")
    files = TlsFiles(**{key: Path(str(path)) for key, path in tls.items()}) if isinstance(tls, Mapping) else None
    return ReplicaSettings(spec=specs.from_json(spec), tls=files, **plain)  # type: ignore[arg-type]


def _tls_to_json(tls: TlsFiles | None) -> dict[str, str] | None:
    if tls is None:
        return None
    return {"cert_file": str(tls.cert_file), "key_file": str(tls.key_file), "ca_file": str(tls.ca_file)}
