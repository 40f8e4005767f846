"""Digest of a model's weights. Replicas with equal digests have the same model.

For the digest, all weights are read once per node. At the same time they are checked for NaN (finite.py).
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from io import FileIO
from pathlib import Path

from cluster.worker.weights import finite
from cluster.worker.weights.sentence_modules import module_files

_HASHED = ("*.safetensors", "*.bin", "*.pt", "*.gguf", "config.json", "generation_config.json")
PIECE_BYTES = 4 << 20
"""Number of bytes read at a time; a multiple of the size of every number type."""


def _files(folder: Path) -> dict[str, Path]:
    """Return the files that are hashed, in order, by their path within the folder."""
    files = {file for pattern in _HASHED for file in folder.glob(pattern)} | set(module_files(folder))
    return dict(sorted((file.relative_to(folder).as_posix(), file) for file in files))


def _file_digest(file: Path, problems: list[str], piece_bytes: int) -> str:
    """Return the SHA-256 of a file. For each tensor that has NaN or infinite numbers, add a message to `problems`."""
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(piece_bytes))
    with file.open("rb", buffering=0) as stream:
        at = 0
        for span in finite.spans(file):
            if span.start < at:
                continue  # the tensor shares its bytes with the previous tensor
            for piece in _pieces(stream, span.start - at, buffer):
                digest.update(piece)
            problem = ""
            for piece in _pieces(stream, span.end - span.start, buffer):
                digest.update(piece)
                problem = problem or finite.not_finite(piece, span)
            if problem:
                problems.append(f"{file.name}: {problem} in {span.name}")
            at = span.end
        for piece in _pieces(stream, file.stat().st_size - at, buffer):
            digest.update(piece)
    return digest.hexdigest()


def _pieces(stream: FileIO, length: int, buffer: memoryview) -> Iterator[memoryview]:
    """Yield the next `length` bytes in pieces. All pieces use the same buffer.

    Raises OSError if the file has fewer bytes.
    """
    while length > 0:
        piece = buffer[: min(length, len(buffer))]
        have = 0
        while have < len(piece):
            count = stream.readinto(piece[have:])
            if not count:
                raise OSError("a weight file became shorter while it was read")
            have += count
        yield piece
        length -= len(piece)


def weight_digest(folder: Path, cache_dir: Path, *, piece_bytes: int = PIECE_BYTES) -> str:
    """Return `sha256:<hex>`, a digest of the names and contents of the weights and the configuration.

    The first call reads every byte, and keeps a record in `cache_dir`. Later calls only compare sizes and modification
    times with the record. Raises ValueError if there is nothing to hash or a tensor has NaN, OSError if a file cannot
    be read.
    """
    files = _files(folder)
    if not files:
        raise ValueError(f"{folder} holds no model files")
    stamps = {name: [file.stat().st_size, file.stat().st_mtime_ns] for name, file in files.items()}
    key = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:32]
    record = cache_dir / "digests" / f"{key}.json"
    known = _read_record(record, stamps)
    if known:
        return known
    total, problems = hashlib.sha256(), list[str]()
    for name, file in files.items():
        total.update(f"{name}\0{_file_digest(file, problems, piece_bytes)}\n".encode())
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise ValueError(
            f"the weights in {folder} are damaged: {'; '.join(problems[:3])}{more}: every answer would be "
            "NaN. Fetch or copy the checkpoint again; one that was trained to NaN cannot be served"
        )
    digest = f"sha256:{total.hexdigest()}"
    _write_record(record, {"stamps": stamps, "digest": digest, "finite": True})
    return digest


def _read_record(record: Path, stamps: dict[str, list[int]]) -> str:
    try:
        kept = json.loads(record.read_text())
    except (OSError, ValueError):
        return ""
    if (
        isinstance(kept, dict)
        and kept.get("finite")
        and kept.get("stamps") == stamps
        and str(kept.get("digest")).startswith("sha256:")
    ):
        return str(kept["digest"])
    return ""


def _write_record(record: Path, content: dict[str, object]) -> None:
    """Write the record atomically. Errors are ignored, since without a record the next call is only slower."""
    try:
        record.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=record.parent, delete=False) as file:
            json.dump(content, file)
        os.replace(file.name, record)
    except OSError:
        return
