"""Tests of real engines on Ray's placement groups: tensor parallelism of three model families, and complete cleanup
after kills."""

from __future__ import annotations

import asyncio
import functools
import os
import re
import signal
import tempfile
from pathlib import Path
from typing import Any

import psutil
import pytest

from cluster.api.types import ModelSpec
from cluster.gateway.links.worker_link import WorkerLink
from cluster.ray import reaper
from cluster.ray.backend import ChildBackend
from cluster.ray.local_cluster import LocalRay
from cluster.worker.settings import ReplicaSettings
from tests.support.checkpoints import build_checkpoint
from tests.support.serving import Door, eventually, greedy, removed
from tests.support.shared_memory import blocks, left_blocks, named_blocks

pytestmark = [pytest.mark.ray, pytest.mark.engine, pytest.mark.timeout(900)]

PROMPTS = ([5, 17, 230, 41, 99, 300], [11, 12, 13, 14], [7] * 40)
TOKENS = 16
ORPHANS_GONE_S = 60.0
HOW_IT_ENDED = {
    "core": "the engine core was killed by SIGKILL",
    "rank": r"rank [01] \(process \d+\) was killed by SIGKILL",
}
UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
"""Pattern of the names that vLLM gives to sockets in the default folder."""


def two_ranks(name: str, folder: Path, gateway: str, **more: object) -> ReplicaSettings:
    """Return settings for a checkpoint at tensor_parallel_size 2, in float32 and with a small cache."""
    spec = ModelSpec(
        name=name,
        source=str(folder),
        dtype="float32",
        tensor_parallel_size=2,
        max_model_len=512,
        engine={"kv_cache_memory_bytes": 64 << 20, "max_num_seqs": 16},
        **more,  # type: ignore[arg-type]
    )
    return ReplicaSettings(spec, "test", gateways=(gateway,))


@functools.cache
def expected(folder: Path) -> list[list[int]]:
    """Return transformers' greedy continuations of the prompts in float32."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return [continued(model, torch.tensor([prompt])) for prompt in PROMPTS]


def continued(model: Any, ids: Any) -> list[int]:
    """Return transformers' greedy continuation of one prompt."""
    import torch

    with torch.no_grad():
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=TOKENS,
            min_new_tokens=TOKENS,
            repetition_penalty=1.0,
            eos_token_id=None,
            pad_token_id=0,
        )
    return [int(token) for token in out[0, ids.shape[1] :]]


async def same_tokens(link: WorkerLink, folder: Path) -> None:
    """Check that the worker's greedy tokens for concurrent prompts equal the tokens of transformers."""
    answers = await asyncio.gather(*(greedy(link, prompt, TOKENS) for prompt in PROMPTS))
    assert answers == await asyncio.to_thread(expected, folder)  # in a thread, since the link's pings need the loop


@pytest.mark.parametrize("family", ["mistral", "falcon"])
@pytest.mark.long
async def test_family_at_tensor_parallel_two(family: str, backend: ChildBackend, door: Door, tmp_path: Path) -> None:
    """The greedy tokens of a model at TP 2 on a placement group equal the tokens of transformers in float32."""
    folder = build_checkpoint(family, tmp_path / family)
    await backend.deploy(two_ranks(family, folder, door.address))
    link = await door.worker(family, 400.0)
    assert link.info.engine_class.endswith("tp2-pp1")
    await same_tokens(link, folder)
    await removed(backend, family)


def tree(ray: LocalRay, folder: Path) -> dict[str, set[psutil.Process]]:
    """Return the processes of the only engine on `ray`: replica, engine core and ranks."""
    processes: dict[str, set[psutil.Process]] = {"replica": set(), "core": set(), "rank": set()}
    for pid in reaper.find(ray.environment()[reaper.INSTANCE_ENV], ray.folder):
        try:
            process = psutil.Process(pid)
            title = " ".join(process.cmdline())
        except psutil.NoSuchProcess:
            continue
        for part, mark in (("replica", "ray::ServeReplica"), ("core", "EngineCore"), ("rank", "RayWorker")):
            if mark in title:
                processes[part].add(process)
    return processes


def is_alive(process: psutil.Process) -> bool:
    """Return whether a process exists and is not a zombie."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def maps(process: psutil.Process) -> str:
    """Return a process's memory mappings."""
    return Path(f"/proc/{process.pid}/maps").read_text()


def has_avx512() -> bool:
    """Return whether this machine has AVX-512. Without it, vLLM's x86 kernels have no communicator in shared memory."""
    return " avx512f " in Path("/proc/cpuinfo").read_text()


def left(ray: LocalRay, folder: Path) -> set[psutil.Process]:
    """Return the processes of the engines on `ray` that are still running."""
    return {process for processes in tree(ray, folder).values() for process in processes if is_alive(process)}


def sockets() -> set[str]:
    """Return the names of the sockets on this machine that may belong to an engine."""
    return {name for name in os.listdir(tempfile.gettempdir()) if UUID.fullmatch(name)}


def _end_reason(door: Door, known: int) -> str | None:
    """Return why the engine that was lost last has ended. Returns None if the gateway has reported no lost engine
    beyond the first `known` ones."""
    ends = door.lost_engines()
    return ends[-1].reason if len(ends) > known else None


@pytest.mark.parametrize(
    ("victims", "serves_again"), [(("core",), False), pytest.param(("replica", "rank"), True, marks=pytest.mark.long)]
)
@pytest.mark.thorough
async def test_llama_and_its_deaths(
    victims: tuple[str, ...],
    serves_again: bool,
    backend: ChildBackend,
    door: Door,
    local_ray: LocalRay,
    tmp_path: Path,
) -> None:
    """After SIGKILL of the replica, the engine core or a rank (LLaMA at TP 2), no processes and no shared memory are
    left. The gateway reports which process ended, the cause and the log file.

    If `serves_again` is set, the test also checks that the model serves again after each death.
    """
    folder, others, files = build_checkpoint("llama", tmp_path / "llama"), blocks(), sockets()
    await backend.deploy(two_ranks("llama", folder, door.address))
    link = await door.worker("llama", 400.0)
    await same_tokens(link, folder)
    for victim in victims:
        before = tree(local_ray, folder)
        assert {part: len(processes) for part, processes in before.items()} == {"replica": 1, "core": 1, "rank": 2}
        everyone = set().union(*before.values())
        for mapped in map(maps, before["rank"]):
            assert "cpushm" in mapped or not has_avx512(), "ranks of one host share memory"
            assert "/dev/shm/psm_" in mapped
        assert not set().union(*(named_blocks(process.pid) for process in everyone)), "no name is left of it"
        known = len(door.lost_engines())
        next(iter(before[victim])).send_signal(signal.SIGKILL)
        await eventually(
            lambda e=everyone: not any(map(is_alive, e)) or None,  # type: ignore[misc]
            f"nothing is left after the {victim}'s death",
            ORPHANS_GONE_S,
        )
        assert not left_blocks(others), f"names after the {victim}'s death"
        assert not sockets() - files, f"sockets after the {victim}'s death"
        if victim in HOW_IT_ENDED:
            reason = await eventually(
                lambda k=known: _end_reason(door, k),  # type: ignore[misc]
                f"the gateway knows of the {victim}'s death",
            )
            match = re.fullmatch(rf"{HOW_IT_ENDED[victim]}; log: (?P<log>/\S+)", reason)
            assert match is not None, door.lost_engines()
            assert Path(match["log"]).is_file()  # noqa: ASYNC240
        if serves_again:
            link = await door.worker("llama", 400.0, but=link.identity.incarnation)
            await same_tokens(link, folder)
    await removed(backend, "llama")
    await eventually(lambda: not left(local_ray, folder) or None, "nothing is left of the engine", ORPHANS_GONE_S)
    assert not left_blocks(others)
    assert not sockets() - files
    assert os.getpid() not in reaper.find(local_ray.environment()[reaper.INSTANCE_ENV])
