"""Repairs of faults in vLLM that end an engine or leave files behind. The repairs are applied at run time.

**Seeds on CPU (vLLM 0.32.0).** When the prompt of a request with a seed is prefilled in chunks, a token is sampled
after each chunk and discarded. The V1 runner then undoes the draw with `generator.set_offset(offset - 4)`. CPU
generators have no offset, so the call raises an error that ends the engine core. The repair gives requests a generator
that saves its state before each draw and can restore the state.

**Ranks on two hosts on CPU (vLLM 0.32.0).** Ranks of a group communicate over shared memory if all ranks have the same
name for it. The name consists only of a port, so even ranks on hosts without common memory try shared memory, and the
engine does not start. The repair adds an id of the shared memory to the name. Ranks without common memory then use the
network.

**Names that are gone (vLLM 0.32.0).** A queue between core and ranks unlinks its shared memory when it is freed, and
prints a traceback if the name is already unlinked. The ranks' lock does the same with its semaphore. In every engine
that is up, these names are already unlinked (watchdog.py). The repair ignores a missing name.

**Rendezvous file of the ranks (vLLM 0.32.0).** Each engine creates a file in /tmp by which its ranks find each other,
and a killed engine leaves the file behind. The repair creates the file in the folder of the engine's sockets, which is
removed when the engine ends, or later by another engine.

**Core among several Ray nodes (vLLM 0.32.0, Ray 2.60).** A core joins Ray as a driver. Ray looks for the driver's node
among all processes that it sees, and tries the head node first. If nodes with different addresses share a process table
(pods with hostPID), Ray may find another node than the replica's. The core then listens on an address that is not its
own. The repair passes the address of the replica's node to Ray.

**Pipeline parallelism on CPU (vLLM 0.32.0).** Each rank except the first copies its input into tensors that only a
profiling run creates. Without compilation the CPU runner creates no such tensors, so the first step ends the engine.
The repair creates the tensors in the first step.

**Base model together with adapters on CPU (vLLM 0.32.0).** The operations of adapters choose a row's adapter by a slot
index. A row without an adapter has the index -1, which in PyTorch selects the last slot. So when every slot holds an
adapter, the base model's rows are computed with the adapter of the last slot. The repair gives such rows the first
adapter and an input of zeros, to which every adapter adds nothing.

**Masks of grammars (vLLM 0.32.0).** One request's grammar can slow the steps of all requests without bound. The repair
measures the masks, and ends such a request (grammar/mask_times.py).

**Rotation of heads on CPU (vLLM 0.32.0).** The CPU kernel of rotary embeddings takes tensors of tokens by (heads times
head size). Of a tensor of tokens by heads by head size (LFM2 passes such tensors) it rotates other memory, so that an
answer depends on the other requests of its step. The repair passes the kernel a view in the first form.

**Strings that are not JSON (xgrammar 0.2.8).** A grammar allows control characters in strings with a length bound, and
unknown escapes in e-mail addresses. The repair excludes both (json_strings.py).
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import inspect
import ipaddress
import os
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import resource_tracker, synchronize
from pathlib import Path
from typing import Any

from cluster.worker.engine.processes import sockets
from cluster.worker.engine.vllm.private_names import missing

VERSIONS = ("0.31.0", "0.32.0", "0.33.0")
"""Releases that have these faults; see docs/support.md."""
ACTIVE = "HEADRACE_REPAIRS"
"""Environment variable that an engine sets for its processes. Without it, the plugin does not change vLLM."""

PLUGIN = "headrace_repairs"
"""Name of the entry point that vLLM loads as a plugin."""

NODE = "HEADRACE_NODE_ADDRESS"
"""Environment variable: the address of the replica's Ray node; unset if Ray has not placed the replica."""
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_DRAW = 4
"""Offset that the runner subtracts for one draw (counted as in CUDA's Philox)."""

_applied: set[str] = set()
not_applied: dict[str, str] = {}
"""Repairs that could not be applied to this vLLM, each with the reason."""


def _version() -> str:
    import vllm

    return str(vllm.__version__).split("+")[0]


@functools.cache
def rewindable_generator() -> Any:
    """Return a class of CPU generators that can undo their last draw."""
    import torch

    class RewindableGenerator(torch.Generator):  # type: ignore[misc]
        """A CPU generator that can undo its last draw."""

        before: Any = None

        def remember(self) -> None:
            self.before = self.get_state()

        def get_offset(self) -> int:
            return _DRAW

        def set_offset(self, _: int) -> None:
            if self.before is not None:
                self.set_state(self.before)

    return RewindableGenerator


def _repair_seeds() -> None:
    from vllm.v1.sample.ops.topk_topp_sampler import TopKTopPSampler
    from vllm.v1.worker.gpu_input_batch import CachedRequestState

    rewindable = rewindable_generator()
    sample, post_init = TopKTopPSampler.forward_cpu, CachedRequestState.__post_init__

    @functools.wraps(sample)
    def forward_cpu(self: Any, logits: Any, generators: Any, k: Any, p: Any) -> Any:
        for generator in generators.values():
            if isinstance(generator, rewindable):
                generator.remember()
        return sample(self, logits, generators, k, p)

    def __post_init__(self: Any) -> None:
        post_init(self)
        if self.generator is not None and self.generator.device.type == "cpu":
            generator = rewindable(device="cpu")
            generator.set_state(self.generator.get_state())
            self.generator = generator

    TopKTopPSampler.forward_cpu = forward_cpu
    CachedRequestState.__post_init__ = __post_init__


def shared_memory() -> str:
    """Return an id of this process's /dev/shm, which belongs to the host or to a container.

    Two processes with equal ids can communicate over shared memory.
    """
    return f"{BOOT_ID.read_text().strip()}-{os.stat('/dev/shm').st_dev}"  # noqa: S108


def _repair_shared_memory() -> None:
    from vllm.distributed.device_communicators.cpu_communicator import _CPUSHMDistributed

    named = _CPUSHMDistributed.make_group_name

    def make_group_name(communicator: Any) -> str:
        return f"{named(communicator)}-{shared_memory()}"

    _CPUSHMDistributed.make_group_name = staticmethod(make_group_name)


def _repair_queues() -> None:
    from vllm.distributed.device_communicators.shm_broadcast import ShmRingBuffer

    _free_quietly(ShmRingBuffer)
    with contextlib.suppress(ImportError):  # new in 0.32
        from vllm.distributed.device_communicators.shm_tensor_arena import ShmTensorArena

        _free_quietly(ShmTensorArena)
    _free_semaphores_quietly()


def _free_quietly(kind: Any) -> None:
    freed = kind.__del__

    @functools.wraps(freed)
    def __del__(self: Any) -> None:
        try:
            freed(self)
        except FileNotFoundError:
            resource_tracker.unregister(f"/{self.shared_memory.name}", "shared_memory")  # unlink() would do this last

    kind.__del__ = __del__


def _free_semaphores_quietly() -> None:
    locks: Any = synchronize.SemLock
    clean_up = locks._cleanup

    def _cleanup(name: str) -> None:
        try:
            clean_up(name)
        except FileNotFoundError:
            resource_tracker.unregister(name, "semaphore")  # the clean-up would do this last

    locks._cleanup = staticmethod(_cleanup)


def _repair_rendezvous() -> None:
    from vllm.v1.executor import multiproc_executor, uniproc_executor

    default = multiproc_executor.get_file_store_init_method

    def get_file_store_init_method() -> str:
        folder = sockets.folder()
        return default() if folder is None else f"file://{folder}/meeting-{uuid.uuid4().hex}"

    for executor in (multiproc_executor, uniproc_executor):
        executor.get_file_store_init_method = get_file_store_init_method


def _repair_pipeline() -> None:
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    gather = GPUModelRunner.sync_and_gather_intermediate_tensors

    @functools.wraps(gather)
    def sync_and_gather_intermediate_tensors(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.intermediate_tensors is None:
            self.intermediate_tensors = self.model.make_empty_intermediate_tensors(
                batch_size=self.max_num_tokens, dtype=self.model_config.dtype, device=self.device
            )
        return gather(self, *args, **kwargs)

    GPUModelRunner.sync_and_gather_intermediate_tensors = sync_and_gather_intermediate_tensors


def _without_adapter_adds_nothing(operation: Callable[..., None]) -> Callable[..., None]:
    """Wrap a LoRA operation of vLLM's torch_ops so that rows without an adapter (index -1) get an input of zeros."""
    import torch

    signature = inspect.signature(operation)

    @functools.wraps(operation)
    def masked(*args: Any, **kwargs: Any) -> None:
        bound = signature.bind(*args, **kwargs)
        index, inputs = bound.arguments["lora_indices_tensor"], bound.arguments["inputs"]
        has_adapter = index >= 0
        bound.arguments["inputs"] = torch.where(has_adapter[:, None], inputs, torch.zeros((), dtype=inputs.dtype))
        bound.arguments["lora_indices_tensor"] = index.clamp(min=0)
        operation(*bound.args, **bound.kwargs)

    return masked


def _repair_base_rows() -> None:
    import torch
    from vllm.lora.ops import torch_ops
    from vllm.lora.ops.torch_ops import lora_ops
    from vllm.lora.punica_wrapper import punica_cpu

    for name in ("bgmv_shrink", "bgmv_expand", "bgmv_expand_slice"):
        repaired = _without_adapter_adds_nothing(getattr(lora_ops, name))
        for module in (lora_ops, torch_ops, punica_cpu):  # each module has its own reference to the function
            if not hasattr(module, name):
                raise AttributeError(f"{module.__name__} has no {name}")
            setattr(module, name, repaired)
    weights, output = torch.ones(2, 1, 1, 1), torch.zeros(2, 1)
    lora_ops.bgmv_expand(torch.ones(2, 1), weights, output, torch.tensor([-1, 1]))
    if output.tolist() != [[0.0], [1.0]]:
        raise RuntimeError(f"a row without an adapter gets {output.tolist()}")


def _repair_rotation() -> None:
    import torch
    from vllm import _custom_ops

    rotate = _custom_ops.rotary_embedding

    @functools.wraps(rotate)
    def rotary_embedding(positions: Any, query: Any, key: Any, *args: Any, **kwargs: Any) -> None:
        both = [tensor for tensor in (query, key) if tensor is not None]
        if all(tensor.dim() <= positions.dim() + 1 for tensor in both):
            rotate(positions, query, key, *args, **kwargs)
            return
        flat = [tensor.flatten(positions.dim()) for tensor in both]
        rotate(positions, flat[0], flat[1] if len(flat) > 1 else None, *args, **kwargs)
        for tensor, rotated in zip(both, flat, strict=True):
            if rotated.data_ptr() != tensor.data_ptr():  # the heads do not lie side by side, so `flatten` has copied
                tensor.copy_(rotated.view_as(tensor))

    _custom_ops.rotary_embedding = rotary_embedding
    quarter_turn = torch.tensor([[0.0] * 16 + [1.0] * 16])
    heads = torch.ones(1, 2, 32)
    rotary_embedding(torch.tensor([0]), heads, None, 32, quarter_turn, True)
    if heads.tolist() != [[[-1.0] * 16 + [1.0] * 16] * 2]:
        raise RuntimeError("the heads of a token are not all rotated")


def _has_node() -> bool:
    """Return whether the replica has a Ray node whose address is not loopback. Only such a replica needs the repair
    `node`.

    A node at a loopback address is the only node of its Ray cluster. For such a node the repair would do harm: Ray
    would replace the loopback address by an external address of the machine.
    """
    address = os.environ.get(NODE, "")
    return bool(address) and not ipaddress.ip_address(address).is_loopback


def _repair_node() -> None:
    from vllm.v1.executor import ray_executor_v2

    ray, joined = ray_executor_v2.ray, ray_executor_v2.initialize_ray_cluster

    @functools.wraps(joined)
    def initialize_ray_cluster(parallel_config: Any, *args: Any, **kwargs: Any) -> None:
        if not ray.is_initialized():
            ray.init(_node_ip_address=os.environ[NODE], runtime_env=parallel_config.ray_runtime_env)
        joined(parallel_config, *args, **kwargs)

    ray_executor_v2.initialize_ray_cluster = initialize_ray_cluster


def loaded_in_ranks() -> bool:
    """Return whether vLLM's processes load these repairs.

    The processes load them if the entry point is installed and VLLM_PLUGINS allows it.
    """
    import vllm.envs

    allowed = vllm.envs.VLLM_PLUGINS
    installed = {point.name for point in importlib.metadata.entry_points(group="vllm.general_plugins")}
    return PLUGIN in installed and (allowed is None or PLUGIN in allowed)


def seeds_are_safe() -> bool:
    """Return whether the repair `seeds`, which makes seeds work on CPU, can be used with this vLLM.

    Without the repair, the engine refuses seeds on CPU.
    """
    return _version() in VERSIONS and loaded_in_ranks() and "seeds" not in not_applied


@dataclass(frozen=True, slots=True)
class Repair:
    """A named repair. `needed()`: returns whether this process has the fault. `make()`: applies the repair."""

    name: str
    make: Callable[[], None]
    needed: Callable[[], bool]


def _on_cpu() -> bool:
    from vllm.platforms import current_platform

    return bool(current_platform.is_cpu())


def _install_resume() -> None:
    from cluster.worker.engine.vllm import resume

    if lacking := missing(resume.CORE_SYMBOLS):
        raise NotImplementedError(f"this vLLM lacks {', '.join(lacking)}")
    resume.install(v1_ranks=_on_cpu() and not missing(resume.V1_SYMBOLS))


def _repair_strings() -> None:
    from cluster.worker.engine.vllm.grammar import json_strings

    json_strings.install()


def _time_masks() -> None:
    from cluster.worker.engine.vllm.grammar import mask_times

    if lacking := missing(mask_times.SYMBOLS):
        raise NotImplementedError(f"this vLLM lacks {', '.join(lacking)}")
    mask_times.install()


REPAIRS = (
    Repair("seeds", _repair_seeds, _on_cpu),
    Repair("shared memory", _repair_shared_memory, _on_cpu),
    Repair("pipeline", _repair_pipeline, _on_cpu),
    Repair("base rows", _repair_base_rows, _on_cpu),
    Repair("rotation", _repair_rotation, _on_cpu),
    Repair("resume", _install_resume, lambda: True),
    Repair("queues", _repair_queues, lambda: True),
    Repair("strings", _repair_strings, lambda: True),
    Repair("masks", _time_masks, lambda: True),
    Repair("meeting", _repair_rendezvous, lambda: True),
    Repair("node", _repair_node, lambda: _has_node() and os.environ.get("VLLM_USE_RAY_V2_EXECUTOR_BACKEND") == "1"),
)
"""Repairs in the order in which they are applied: "resume" builds on the repaired generators."""


def apply() -> None:
    """Apply the repairs that this process needs. Plugin for vllm.general_plugins, loaded in every vLLM process.

    Idempotent. Does nothing in a vLLM process that does not belong to a replica's engine. Each repair is applied
    independently of the others. If a repair fails on this vLLM, the error is recorded in `not_applied` and not raised,
    because vLLM would report an error of a plugin as an unknown model.
    """
    if not os.environ.get(ACTIVE) or _applied:
        return
    if _version() not in VERSIONS:
        not_applied["all"] = f"vLLM {_version()} is not known; known are {', '.join(VERSIONS)}"
        return
    for repair in REPAIRS:
        try:
            if repair.needed():
                repair.make()
        except Exception as error:  # the names differ in another release, and a missing name can raise anything
            not_applied[repair.name] = f"{type(error).__name__}: {error}"
    _applied.add("all")


def why_no_adapters() -> str:
    """Return why this vLLM cannot serve adapters together with the base model on this platform; empty if it can."""
    if not _on_cpu():
        return ""
    if _version() not in VERSIONS:
        return f"vLLM {_version()} is not known to serve the base model right beside adapters on CPUs"
    if not loaded_in_ranks():
        return f"the plugin {PLUGIN}, which repairs adapters on CPUs, is not loaded in vLLM's processes"
    reason = not_applied.get("base rows", "")
    return f"the repair of adapters on CPUs could not be applied: {reason}" if reason else ""


def why_resume_is_plain(config: Any) -> str:
    """Return why an engine with this VllmConfig cannot install emitted tokens. Such an engine resumes a request as a
    new prompt.

    Returns "" if the engine can install emitted tokens.
    """
    from cluster.worker.engine.vllm import resume

    if _version() not in VERSIONS:
        return f"vLLM {_version()} is not known"
    if not loaded_in_ranks():
        return f"the plugin {PLUGIN} is not loaded in vLLM's processes"
    if "resume" in not_applied:
        return not_applied["resume"]
    return resume.why_plain(config)
