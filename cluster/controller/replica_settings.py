"""Settings of replicas, made from the configuration."""

from __future__ import annotations

from collections.abc import Sequence

from cluster.config.gateway import Tls
from cluster.config.schema import Config
from cluster.wire.tls import TlsFiles
from cluster.worker.settings import ReplicaSettings

LOCAL_DRAIN_S = 2.0


def settings_of(config: Config, *, gateways: Sequence[str], local: bool) -> list[ReplicaSettings]:
    """Return the settings with which replicas are started: one ReplicaSettings for each model, version and GPU type."""
    weights = config.weights
    token_file = weights.hugging_face.token_file
    return [
        ReplicaSettings(
            spec=spec,
            cluster=config.name,
            gateways=tuple(gateways),
            max_gateways=config.link.max_gateways,
            ray_cluster="local" if local else spec.ray or config.ray[0].name,
            tls=link_tls(config, local=local),
            cache_dir=str(weights.cache_dir) if weights.cache_dir else "",
            hugging_face_endpoint=weights.hugging_face.endpoint,
            hugging_face_token_file=str(token_file) if token_file else "",
            allowed_sources=weights.allow.sources,
            allowed_formats=weights.allow.formats,
            allowed_licenses=weights.allow.licenses,
            allow_remote_code=weights.allow.remote_code,
            drain_timeout_s=LOCAL_DRAIN_S if local else config.gateway.drain_timeout_s,
        )
        for model in config.models
        for spec in model.specs()
    ]


def link_tls(config: Config, *, local: bool) -> TlsFiles | None:
    """Return the certificate files for the links of workers and of the controller.

    These are the files of `link.tls`. If `link.tls` is not set, they are the files of `gateway.link_tls` for a local
    cluster (`local`), else None.
    """
    files: Tls | None = config.link.tls or (config.gateway.link_tls if local else None)
    return TlsFiles(files.cert_file, files.key_file, files.ca_file) if files else None
