"""What the processes of an engine import: loaded once, in the server that they fork from (fork_server.py).

Nothing here may start a thread, touch a GPU or load vLLM's plugins: those are each process's own.
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
    with contextlib.suppress(ImportError):  # another release's name: that process then imports what it needs
        importlib.import_module(_name)
with contextlib.suppress(ImportError):
    import setproctitle

    setproctitle.getproctitle()  # it finds its place beside the environment, which a fork replaces
gc.freeze()  # what has come stays shared with the forks
