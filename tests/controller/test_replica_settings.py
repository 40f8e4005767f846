"""Tests of replica settings: they have every configuration key that a replica needs, by version and GPU type."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from cluster.config.document import parse
from cluster.controller.replica_settings import settings_of

CONFIG = """
api_version: headrace/v1
name: prod
gateway: {drain_timeout_s: 9}
link: {gateways: ["10.0.0.1:50052"], tls: {cert_file: /c, key_file: /k, ca_file: /a}}
ray: [{name: blue, dashboard_url: "http://ray:8265"}]
weights: {cache_dir: /models, hugging_face: {endpoint: "https://mirror.example"}, allow: {sources: ["/m/*"]}}
models: [{name: m, source: /m/x, replicas: {min: 2}}]
"""

VERSIONS = """engine: {max_num_seqs: 8},
  gpu: [{type: H100}, {type: L4, tensor_parallel_size: 4, engine: {kv_cache_dtype: fp8}}],
  canary: {version: v2, revision: r2, ray: blue, weight: 0.25, rollback: {error_ratio: 2}}"""


def test_settings_come_from_the_configuration() -> None:
    """Every configuration key that a replica needs is in the settings of the replica."""
    (prod,) = settings_of(parse(CONFIG), gateways=["10.0.0.1:50052"], local=False)
    assert (prod.cluster, prod.ray_cluster, prod.gateways) == ("prod", "blue", ("10.0.0.1:50052",))
    assert (prod.cache_dir, prod.hugging_face_endpoint) == ("/models", "https://mirror.example")
    assert (prod.allowed_sources, prod.drain_timeout_s, prod.spec.replicas) == (("/m/*",), 9.0, 2)
    assert prod.tls is not None
    assert prod.tls.cert_file == Path("/c")
    (local,) = settings_of(parse(CONFIG), gateways=[], local=True)
    assert dataclasses.replace(local, gateways=prod.gateways, ray_cluster="blue", drain_timeout_s=9.0) == prod


def test_versions_and_types_come_from_the_configuration() -> None:
    """Each version of a model has settings for each of its GPU types. The settings have the values and the Ray cluster
    that the configuration gives the version."""
    config = parse(
        CONFIG.replace("ray: [", 'ray: [{name: green, dashboard_url: "http://green:8265"}, ')
        .replace("source: /m/x", "source: /m/x, revision: r1, digest: 'sha256:" + "a" * 64 + "', " + VERSIONS)
        .replace("replicas: {min: 2}", "replicas: {min: 2}, fallback: [n]}, {name: n, source: /m/n")
    )
    variants = settings_of(config, gateways=[], local=False)
    keys = [(s.spec.name, s.spec.version, s.spec.gpu, s.spec.tensor_parallel_size, s.ray_cluster) for s in variants]
    assert keys == [
        ("m", "v1", "H100", 1, "green"),
        ("m", "v1", "L4", 4, "green"),
        ("m", "v2", "H100", 1, "blue"),
        ("m", "v2", "L4", 4, "blue"),
        ("n", "v1", "", 1, "green"),
    ]
    assert [(s.spec.revision, s.spec.weight, s.spec.error_ratio) for s in variants[1:3]] == [
        ("r1", 0.75, 0.0),
        ("r2", 0.25, 2.0),
    ]
    assert variants[1].spec.engine == {"max_num_seqs": 8, "kv_cache_dtype": "fp8"}
    assert variants[2].spec.digest == "", "the pin is of the other version's weights"
    assert variants[0].spec.fallback == ("n",)
