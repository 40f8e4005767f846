"""Faults of vLLM that a request could use to end an engine, repaired in place; each names its release and its check.

**Seeds on CPU (vLLM 0.32.0).** A request with a seed whose prompt is prefilled in chunks is sampled from after each
chunk, and the sample thrown away; the V1 runner then takes the draw back with `generator.set_offset(offset - 4)`. CPU
generators have no offset, so this raises in the engine core and ends it. The repair gives requests a generator that
remembers its state before the last draw and returns to it.

**Ranks on two hosts on CPU (vLLM 0.32.0).** Ranks of a group talk over shared memory where all name it alike, but the
name is made of a port alone, so ranks on hosts that share none try it, too, and the engine does not come up. The repair
puts into the name which memory it is; ranks that share none then talk over the network.

**Blocks that are gone (vLLM 0.32.0).** A queue between core and ranks takes its shared memory's name away when it is
freed, and prints a traceback where somebody has done so before: an engine that is up does (watchdog.py). The repair is
content when the name is gone.

**Where ranks meet (vLLM 0.32.0).** Each engine makes a file in /tmp by which its ranks find each other, and one that is
killed leaves it. The repair makes it in the folder of the engine's sockets, which goes with it or is swept.

**A core beside several of Ray's nodes (vLLM 0.32.0, Ray 2.60).** A core joins Ray as a driver, and Ray looks for the
driver's node among all processes that it sees, the head first. Where nodes with addresses of their own share a process
table (pods with hostPID) that is another than the replica's, and the core then listens on an address that is not its
own. The repair tells Ray the address of the replica's node.

**Pipeline parallelism on CPU (vLLM 0.32.0).** A rank that is not the first copies what it receives into tensors that
only a profiling run makes, and the CPU runner makes none where nothing is compiled: the first step ends the engine. The
repair makes them with the first step.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import ipaddress
import os
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any

from cluster.worker.engine.processes import sockets
from cluster.worker.engine.vllm.private_names import missing

VERSIONS = ("0.31.0", "0.32.0", "0.33.0")
"""Releases whose faults are these; see docs/support.md."""
ACTIVE = "HEADRACE_REPAIRS"
"""Environment: set by an engine for its processes; a vLLM that merely has this package beside it stays as it is."""

PLUGIN = "headrace_repairs"
"""Name of the entry point."""

NODE = "HEADRACE_NODE_ADDRESS"
"""Environment: the address of the Ray node that a replica is on; nothing where Ray has not placed it."""
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_DRAW = 4
"""What the runner subtracts for one draw (counted as CUDA's Philox counts)."""

_applied: set[str] = set()
not_applied: dict[str, str] = {}
"""Repairs that this vLLM has no place for, with why."""


def _version() -> str:
    import vllm

    return str(vllm.__version__).split("+")[0]


@functools.cache
def rewindable_generator() -> Any:
    """The class of CPU generators that can take back their last draw."""
    import torch

    class RewindableGenerator(torch.Generator):  # type: ignore[misc]
        """A CPU generator that can take back its last draw."""

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
    """Which shared memory this process has: its host's, or its container's own."""
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


def _free_quietly(kind: Any) -> None:
    freed = kind.__del__

    @functools.wraps(freed)
    def __del__(self: Any) -> None:
        try:
            freed(self)
        except FileNotFoundError:
            resource_tracker.unregister(f"/{self.shared_memory.name}", "shared_memory")  # what unlink() does at its end

    kind.__del__ = __del__


def _repair_meeting() -> None:
    from vllm.v1.executor import multiproc_executor, uniproc_executor

    elsewhere = multiproc_executor.get_file_store_init_method

    def get_file_store_init_method() -> str:
        folder = sockets.folder()
        return elsewhere() if folder is None else f"file://{folder}/meeting-{uuid.uuid4().hex}"

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


def _has_node() -> bool:
    """Whether others may be beside it: not at a loopback address, for which Ray would take the machine's outer one."""
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
    """Whether vLLM's processes load these repairs: the entry point is installed, and VLLM_PLUGINS lets it in."""
    import vllm.envs

    allowed = vllm.envs.VLLM_PLUGINS
    installed = {point.name for point in importlib.metadata.entry_points(group="vllm.general_plugins")}
    return PLUGIN in installed and (allowed is None or PLUGIN in allowed)


def seeds_are_safe() -> bool:
    """Whether seeds are repaired for this vLLM; elsewhere the engine refuses seeds on CPU."""
    return _version() in VERSIONS and loaded_in_ranks() and "seeds" not in not_applied


@dataclass(frozen=True, slots=True)
class Repair:
    """One repair by its name. `needed`: whether this process has what it mends."""

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


REPAIRS = (
    Repair("seeds", _repair_seeds, _on_cpu),
    Repair("shared memory", _repair_shared_memory, _on_cpu),
    Repair("pipeline", _repair_pipeline, _on_cpu),
    Repair("resume", _install_resume, lambda: True),
    Repair("queues", _repair_queues, lambda: True),
    Repair("meeting", _repair_meeting, lambda: True),
    Repair("node", _repair_node, lambda: _has_node() and os.environ.get("VLLM_USE_RAY_V2_EXECUTOR_BACKEND") == "1"),
)
"""In this order: what continues a call builds on the repaired generators."""


def apply() -> None:
    """Plugin for vllm.general_plugins, loaded in every vLLM process. Idempotent; does nothing outside our engines.

    Each repair stands by itself: one that this vLLM has no place for is noted in `not_applied`, and raises nothing,
    since vLLM takes an exception of a plugin for a model that it does not know.
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
        except Exception as error:  # names of another release: whatever their absence raises
            not_applied[repair.name] = f"{type(error).__name__}: {error}"
    _applied.add("all")


def why_resume_is_plain(config: Any) -> str:
    """Why engines of this VllmConfig continue a call as a new prompt; empty where they install what it has emitted."""
    from cluster.worker.engine.vllm import resume

    if _version() not in VERSIONS:
        return f"vLLM {_version()} is not known"
    if not loaded_in_ranks():
        return f"the plugin {PLUGIN} is not loaded in vLLM's processes"
    if "resume" in not_applied:
        return not_applied["resume"]
    return resume.why_plain(config)
