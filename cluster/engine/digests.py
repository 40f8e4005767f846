"""A digest of a model's weights: what two replicas compare to know that they hold the same model."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from pathlib import Path

_HASHED = ("*.safetensors", "*.bin", "*.pt", "*.gguf", "config.json", "generation_config.json")


def _files(folder: Path) -> list[Path]:
    return sorted({file for pattern in _HASHED for file in folder.glob(pattern)}, key=lambda file: file.name)


def _file_digest(file: Path) -> str:
    with file.open("rb", buffering=0) as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def weight_digest(folder: Path, cache_dir: Path) -> str:
    """`sha256:<hex>` over names and contents of weights and configuration.

    Reads every byte once; later calls compare sizes and modification times with the record kept in `cache_dir`.
    Raises ValueError when there is nothing to hash, OSError when a file cannot be read.
    """
    files = _files(folder)
    if not files:
        raise ValueError(f"{folder} holds no model files")
    stamps = {file.name: [file.stat().st_size, file.stat().st_mtime_ns] for file in files}
    key = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:32]
    record = cache_dir / "digests" / f"{key}.json"
    known = _known(record, stamps)
    if known:
        return known
    total = hashlib.sha256()
    for file in files:
        total.update(f"{file.name}\0{_file_digest(file)}\n".encode())
    digest = f"sha256:{total.hexdigest()}"
    _keep(record, {"stamps": stamps, "digest": digest})
    return digest


def _known(record: Path, stamps: dict[str, list[int]]) -> str:
    try:
        kept = json.loads(record.read_text())
    except (OSError, ValueError):
        return ""
    if isinstance(kept, dict) and kept.get("stamps") == stamps and str(kept.get("digest")).startswith("sha256:"):
        return str(kept["digest"])
    return ""


def _keep(record: Path, content: dict[str, object]) -> None:
    """Whole or not at all; a cache that cannot be written costs only time."""
    try:
        record.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=record.parent, delete=False) as file:
            json.dump(content, file)
        os.replace(file.name, record)
    except OSError:
        return
