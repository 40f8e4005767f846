"""Functions that start both sides of a comparison: vLLM's OpenAI server, and a gateway with a worker. Both use vLLM's
own engine core with a scripted executor (scripted_core.py)."""

from __future__ import annotations

import asyncio
import json
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

from loadtests import peers
from loadtests.agents.scripted_settings import EXECUTOR, IN_CORE, SCRIPTS, STEP_MS
from loadtests.agents.servers import ENVIRONMENT
from loadtests.children import Children
from loadtests.serving import ours as serving

READY_S = 120.0
ENGINE: Mapping[str, object] = {
    "dtype": "float32",
    "max_num_seqs": 128,
    "max_num_batched_tokens": 262_144,
    "distributed_executor_backend": EXECUTOR,
    "enable_prefix_caching": False,
}
"""Engine arguments of both sides. Prefix caching is off, since it would only make the core hash prompts, and the core
is not measured."""


async def write_models(children: Children, folder: Path, texts: Mapping[str, Mapping[str, str]]) -> Path:
    """Write the models of the families in `texts`, and a script for each text; return their folder. Raises DidNotStart.

    `texts`: for each family name, the texts of the answers, keyed by the answers' keys. A family with no texts gets no
    scripts.
    """
    # A folder of its own, since another part may have written models of the same families with other scripts.
    made, words = Path(tempfile.mkdtemp(prefix="large-models-", dir=folder)), []
    for family, by_key in texts.items():
        file = made / f"{family}.texts.json"
        file.write_text(json.dumps(by_key))
        words.append(f"{family}={file if by_key else ''}")
    command = [sys.executable, "-m", "loadtests.agents.large_models", str(made), *words]
    child = children.start("prepare-large-models", "preparation", command)

    async def written() -> bool:
        return await asyncio.to_thread((made / "ready").exists)

    await child.until(written, "models and scripts are written", READY_S)
    await child.stop()
    return made


def environment(model: Path, step_ms: float) -> dict[str, str]:
    """Return the environment variables for the processes of one compared server. `model`: the folder of a model family.
    If the folder has a `scripts.json`, the engine emits the scripts in this file."""
    scripts = model / "scripts.json"
    return {
        **ENVIRONMENT, "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
        SCRIPTS: str(scripts) if scripts.exists() else "", STEP_MS: f"{step_ms:g}",
    }  # fmt: skip


async def start_server(
    children: Children, model: Path, step_ms: float, engine: Mapping[str, object]
) -> tuple[peers.Peer, int]:
    """Start vLLM's own server; return the peer and its port. `engine`: further arguments. Raises DidNotStart."""
    arguments = {**ENGINE, **engine, "enforce_eager": True}
    return await peers.vllm_server(
        children, serving.MODEL, model / "model", arguments, environment(model, step_ms)
    )  # fmt: skip


async def start_ours(
    children: Children,
    folder: Path,
    model: Path,
    step_ms: float,
    engine: Mapping[str, object],
    name: str = "ours",
    witness: tuple[str, ...] = (),
    tenant_count: int = 1,
) -> serving.Ours:
    """Start a gateway and a worker. Raises DidNotStart.

    `step_ms`: duration of an engine step. `engine`: engine arguments in addition to ENGINE. `witness`: options
    of the measurements in the gateway's process; if empty, nothing is measured there. `tenant_count`: number of
    tenants to create.
    """
    return await serving.start(
        children, folder, bundle=model / "bundle", source=str(model / "model"), engine={**ENGINE, **engine},
        environment={**environment(model, step_ms), **IN_CORE}, name=name, witness=witness, tenant_count=tenant_count,
    )  # fmt: skip
