"""Find the configurations that a restarted gateway, controller or replica refuses, by constructing the real objects.

This module uses none of the rules of `headrace config check`. The gateway object is constructed with files laid out as
in the gateway's pod, and the gateway's ports are bound on an address of this host. The controller's settings and
backend are constructed. A replica's source is looked up, and the replica's placement is compared with the nodes. vLLM
itself makes the replica's engine configuration, in a separate process (`python -m loadtests.hostile.config_oracle`), if
vLLM is installed.
"""

from __future__ import annotations

import importlib.util
import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import yaml

from cluster.api.types import ModelSpec
from cluster.cli.commands.run.pod import controller_problems, gateway_problems
from cluster.cli.commands.run.pod_secrets import manifests
from cluster.config.schema import Config
from cluster.ledger.files import make_secret
from cluster.policy.catalog import specs
from cluster.policy.catalog.placement import capacity, is_simulated, why_unplaceable
from cluster.worker.settings import ReplicaSettings

MOUNTS = {"/tls/": "tls", "/revoked/": "revoked", "/link/": "link-gateway", "/secrets/": "secrets"}
HOST = "127.97.31.5"
"""Address of this host that no other program uses."""
SHAPE = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "num_hidden_layers": 80,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "torch_dtype": "bfloat16",
}
"""Checkpoint configuration that is valid for the models of every preset."""
DEMO = {"num_attention_heads": 9, "num_key_value_heads": 3, "hidden_size": 576, "num_hidden_layers": 30}
DEMO_SOURCES = ("demo://smollm2", "demo://minilm")
ENGINE_S = 600.0


class Oracle:
    """Check of configurations: the objects of all processes are created from a configuration, in temporary folders, to
    find out which process would refuse the configuration. `close` removes the folders."""

    def __init__(self) -> None:
        self._stack = ExitStack()
        self.folder = Path(self._stack.enter_context(tempfile.TemporaryDirectory()))
        self.has_engine = importlib.util.find_spec("vllm") is not None
        for manifest in manifests("ns", "headrace", (), None, 30).objects:
            held: Any = manifest["stringData"]
            metadata: Any = manifest["metadata"]
            for key, value in held.items():
                file = self.folder / metadata["name"].removeprefix("headrace-") / key
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_text(value)
        for name in ("clients", "links"):
            (file := self.folder / "revoked" / name).parent.mkdir(exist_ok=True)
            file.write_text("# none\n")
        for name in ("cluster-secret", "key-pepper"):  # created by `headrace up`
            make_secret(self.folder / name)
        self._stack.callback(_restore_variable, "HEADRACE_CACHE_DIR", os.environ.get("HEADRACE_CACHE_DIR"))
        os.environ["HEADRACE_CACHE_DIR"] = str(self.folder)
        (self.folder / "secrets" / "ray-token").write_text("x" * 48)
        (self.folder / "secrets" / "hf-token").write_text("hf_x")

    def close(self) -> None:
        """Remove the temporary files."""
        self._stack.close()

    def refusals(self, text: str, nodes: Sequence[Mapping[str, float]] | None, *, pod: bool) -> list[str]:
        """Return the reasons why a process would refuse this cluster.yaml. Engines are checked separately
        (`engine_cases`). `nodes`: the nodes of Ray, None if unknown.
        """
        try:
            config = Config.model_validate(yaml.safe_load(self._with_local_paths(text)))
        except (ValueError, TypeError, yaml.YAMLError) as error:
            return [f"every process: {str(error).splitlines()[0]}"]
        reasons = [*self._gateway(config, pod), *self._controller(config, pod)]
        for settings in self._settings(config):
            reasons += self._replica(settings, nodes)
        return reasons

    def _with_local_paths(self, text: str) -> str:
        for mount, name in MOUNTS.items():
            text = text.replace(mount, f"{self.folder}/{name}/")
        return text

    def _gateway(self, config: Config, pod: bool) -> Iterator[str]:
        from cluster.gateway.server import Gateway
        from cluster.ledger.database.connect import make_engine

        yield from (f"gateway: {problem}" for problem in gateway_problems(config, pod=pod, files=pod))
        try:
            if config.store.database_url:
                make_engine(config.store.database_url, "")
            store = config.store.model_copy(update={"database_url": f"sqlite:///{self.folder / 'ledger.db'}"})
            Gateway(config.model_copy(update={"store": store}), self.folder / "gateway")
        except Exception as error:
            yield f"gateway: {error}"
        yield from self._binds(config)

    def _binds(self, config: Config) -> Iterator[str]:
        with ExitStack() as stack:
            for process in range(config.gateway.processes):
                listen = config.gateway.listen.of(process).model_dump()
                for name, address in listen.items():
                    if process and name not in ("link", "metrics"):
                        continue
                    host, _, port = str(address).rpartition(":")
                    bound = stack.enter_context(socket.socket())
                    try:
                        socket.getaddrinfo(host.strip("[]"), int(port), flags=socket.AI_NUMERICHOST)
                        bound.bind((HOST, int(port)))
                        bound.listen(1)
                    except (OSError, OverflowError) as error:
                        if host != "localhost":
                            yield f"gateway {process}: listen.{name} {address}: {error}"

    def _controller(self, config: Config, pod: bool) -> Iterator[str]:
        from cluster.ray.jobs import JobBackend

        if pod:
            yield from (f"controller: {problem}" for problem in controller_problems(config))
        try:
            for ray in config.ray:
                JobBackend(config.name, ray.dashboard_url, None)
            self._settings(config)
        except Exception as error:
            yield f"controller: {error}"

    def _settings(self, config: Config) -> list[ReplicaSettings]:
        from cluster.controller.replica_settings import settings_of

        return settings_of(config, gateways=["g:1"], local=not config.ray)

    def _replica(self, settings: ReplicaSettings, nodes: Sequence[Mapping[str, float]] | None) -> Iterator[str]:
        from cluster.worker.engine.simulated.config import SimConfig
        from cluster.worker.weights.sources import SourceError, SourceRules, resolve

        spec = settings.spec
        try:
            if is_simulated(spec):
                SimConfig.from_source(spec.source, spec.engine).resolved()
            elif not _may_be_fetched(spec.source):
                resolve(spec, SourceRules(self.folder))
        except (SourceError, ValueError) as error:
            yield f"replica: {error}"
        if nodes is not None and settings.spec.gpu == spec.gpu:
            if why := why_unplaceable(spec, nodes):
                yield f"replica: {spec.name}: {why}"
            elif capacity(spec, nodes) < spec.min_replicas:
                yield f"replica: {spec.name}: {spec.min_replicas} replicas, but capacity for {capacity(spec, nodes)}"

    def engine_cases(self, text: str) -> list[dict[str, Any]]:
        """Return the spec of every replica, for `engine_refusals`."""
        config = Config.model_validate(yaml.safe_load(self._with_local_paths(text)))
        return [
            {"spec": specs.to_json(settings.spec)}
            for settings in self._settings(config)
            if not is_simulated(settings.spec)
        ]

    def engine_refusals(self, cases: Sequence[Mapping[str, Any]]) -> list[str]:
        """Return vLLM's error for each case, or "" if vLLM accepts the case. Raises RuntimeError."""
        if not self.has_engine:
            return [""] * len(cases)
        done = subprocess.run(
            [sys.executable, "-m", "loadtests.hostile.config_oracle"],
            input=json.dumps(cases), capture_output=True, text=True, check=False, timeout=ENGINE_S,
        )  # fmt: skip
        if done.returncode:
            raise RuntimeError(f"the engine's process ended with {done.returncode}: {done.stderr.strip()[-1000:]}")
        answers: list[str] = json.loads(done.stdout.splitlines()[-1])
        return answers


def _restore_variable(name: str, value: str | None) -> None:
    if value is None:
        del os.environ[name]
    else:
        os.environ[name] = value


def _may_be_fetched(source: str) -> bool:
    """Return whether a source may exist in a place that this check does not read: on the network or on another node's
    disk."""
    scheme, separator, rest = source.partition("://")
    if not separator:
        return source.startswith(("/", "~"))
    return scheme in ("s3", "gs", "http", "https") or (scheme, rest.count("/")) == ("hf", 1) or source in DEMO_SOURCES


def main() -> None:
    """Read model specs as JSON from standard input. For each spec, write vLLM's error to standard output, or "" if the
    engine settings of the spec cause no error. Runs in a process of its own."""
    from cluster.worker.engine.vllm.arguments import engine_arguments

    answers = []
    with tempfile.TemporaryDirectory() as scratch:
        known: dict[str, str] = {}
        for case in json.load(sys.stdin):
            spec = specs.from_json(case["spec"])
            folder = _checkpoint(Path(scratch), spec)
            bare = _reason(engine_arguments, _without_engine_settings(spec), folder, known)
            reason = _reason(engine_arguments, spec, folder, known)
            answers.append("" if reason == bare else reason)  # same error for a valid entry
    sys.stdout.write("\n" + json.dumps(answers) + "\n")


def _checkpoint(scratch: Path, spec: ModelSpec) -> Path:
    """Write the configuration file of a checkpoint (config.json) and return its folder. The demo model has a known
    configuration. Any other configuration is unknown before the checkpoint is fetched; it is replaced by one whose
    number of attention heads is divisible by the tensor parallel size of `spec`."""
    ranks = spec.tensor_parallel_size
    heads = 64 if 64 % ranks == 0 else 8 * ranks
    free = SHAPE | {"num_attention_heads": heads, "num_key_value_heads": heads, "hidden_size": 128 * heads}
    demo = spec.source.startswith("demo://")
    folder = scratch / ("demo" if demo else f"free-{heads}")
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(SHAPE | DEMO if demo else free))
    return folder


def _without_engine_settings(spec: ModelSpec) -> ModelSpec:
    from dataclasses import replace

    return replace(spec, engine={}, tensor_parallel_size=1, pipeline_parallel_size=1, max_model_len=None)


def _reason(make: Any, spec: ModelSpec, folder: Path, known: dict[str, str]) -> str:
    key = json.dumps(specs.to_json(spec), sort_keys=True, default=str)
    if key not in known:
        try:
            make(spec, folder, "mp").create_engine_config()
            known[key] = ""
        except Exception as error:
            known[key] = f"{type(error).__name__}: {str(error)[:300]}"
    return known[key]


if __name__ == "__main__":
    main()
