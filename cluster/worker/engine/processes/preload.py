"""Modules that all processes of an engine import. The fork server (fork_server.py) imports this module.

Nothing imported here may start a thread, touch a GPU or load vLLM's plugins: each process must do that itself.
"""

from __future__ import annotations

import contextlib
import gc
import importlib

MODULES = (
    "cluster.worker.engine.processes.fork_server",
    "vllm",
    "transformers",
    "vllm.v1.engine.core",
    "vllm.v1.executor.multiproc_executor",
    "vllm.v1.executor.uniproc_executor",
    "vllm.v1.worker.cpu_worker",
    "vllm.v1.worker.cpu_model_runner",
    "vllm.model_executor.model_loader",
    "vllm.model_executor.models",
    "vllm.distributed.parallel_state",
)

for _name in MODULES:
    with contextlib.suppress(ImportError):  # the name differs in another release: the forks import it themselves
        importlib.import_module(_name)
with contextlib.suppress(ImportError):
    import setproctitle

    setproctitle.getproctitle()  # locates the title's memory beside the environment, which a fork replaces
gc.freeze()  # keeps the imported objects' memory shared with the forks
