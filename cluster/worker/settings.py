"""The settings that start a replica: immutable values that can be pickled or converted to JSON. Independent of Ray."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from cluster.api.types import ModelSpec
from cluster.policy.catalog import specs
from cluster.policy.catalog.reconcile import app_name
from cluster.policy.routing.gateway_subset import ALL_UP_TO
from cluster.wire.tls import TlsFiles

_REFUSED = "headrace-refused"
_REFUSAL = re.compile(_REFUSED + r'("(?:[^"\\]|\\.)*")')


class ModelRefused(Exception):
    """An error for a catalog entry that cannot work, so that a retry would fail, too. The reason is shown to the user.

    The exception's text contains the reason as a JSON string after a marker. So the controller can extract the reason
    from the text of Ray's error (`find_refusal`).
    """

    def __init__(self, reason: str) -> None:
        super().__init__(_REFUSED + json.dumps(reason))
        self.reason = reason

    def __reduce__(self) -> tuple[type[ModelRefused], tuple[str]]:
        return ModelRefused, (self.reason,)


def find_refusal(text: str) -> str:
    """Return the reason of the last ModelRefused in `text`; "" if there is none."""
    marks = _REFUSAL.findall(text)
    return str(json.loads(marks[-1])) if marks else ""


@dataclass(frozen=True, slots=True)
class ReplicaSettings:
    """The settings of a model's replicas. `spec`: the model's catalog entry. `environment`: variables to add to the
    replica's environment.

    Paths are on the replica's node.
    """

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
    max_gateways: int = ALL_UP_TO
    """Usual number of gateways that a replica connects to if there are more than this number."""
    replicas: int | None = None
    """Number of replicas to start with; None for the number in the spec."""
    environment: Mapping[str, str] = field(default_factory=dict)

    def surroundings(self) -> dict[str, object]:
        """Return the settings, other than the spec, whose change requires a new replica. The values are JSON values."""
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
        """Return the settings as plain JSON values; `from_json` is the inverse."""
        return {**self.surroundings(), **self._rules(), "spec": specs.to_json(self.spec)}

    def _rules(self) -> dict[str, object]:
        """Return the settings that are used only while replicas start. If they change, running replicas are not
        replaced."""
        return {
            "allowed_sources": list(self.allowed_sources),
            "allowed_formats": list(self.allowed_formats),
            "allowed_licenses": list(self.allowed_licenses),
            "replicas": self.replicas,
            # Replicas of an older release do not know the key.
            **({"max_gateways": self.max_gateways} if self.max_gateways != ALL_UP_TO else {}),
        }

    @property
    def digest(self) -> str:
        """Digest of all settings whose change requires a new replica: the catalog entry `spec`, and the settings that
        `surroundings` returns."""
        return specs.digest(self.spec, self.surroundings())

    @property
    def app(self) -> str:
        """Name of the replica's Ray Serve application, without the name of the Ray cluster."""
        return app_name(self.spec.name, self.spec.version, self.digest)


def from_json(values: Mapping[str, object]) -> ReplicaSettings:
    """Parse the values that `ReplicaSettings.to_json` returns. Raises ValueError or TypeError for other values."""
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
