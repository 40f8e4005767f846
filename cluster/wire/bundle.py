"""A tokenizer bundle: the few files a gateway needs to speak a model's tokens, named by their digest.

A bundle is what a worker or the controller makes from a model's folder (worker/weights/tokenizer_bundle.py) and what a
gateway fetches once by digest and keeps on disk. It holds text files only: tokenizer.json (the fast tokenizer as
transformers loads it), tokenizer_config.json, chat templates and generation_config.json; never weights or code.
"""

from __future__ import annotations

import hashlib
import os
import struct
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

MAX_BUNDLE_BYTES = 256 * 1024 * 1024
_PLAIN_SAMPLING = {
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "temperature": 1.0,
    "top_k": 0,
    "top_p": 1.0,
    "min_p": 0.0,
}


def sampling_defaults(generation_config: Mapping[str, object]) -> dict[str, object]:
    """What a model's generation_config.json says of sampling, as an engine takes it for calls that say nothing: what is
    not plain, and max_new_tokens as max_tokens."""
    found = {k: generation_config.get(k) for k, plain in _PLAIN_SAMPLING.items() if generation_config.get(k) != plain}
    found = {k: value for k, value in found.items() if isinstance(value, (int, float))}
    most = generation_config.get("max_new_tokens")
    return found | ({"max_tokens": most} if isinstance(most, int) else {})


@dataclass(frozen=True, slots=True)
class Bundle:
    """File name -> content. Names are plain (no separators); equality and `digest` are by content."""

    files: Mapping[str, bytes]

    def __post_init__(self) -> None:
        for name in self.files:
            if not name or name != os.path.basename(name) or name.startswith("."):
                raise ValueError(f"bundle file name {name!r} must be plain: no folders, no leading dot")

    @property
    def digest(self) -> str:
        """`sha256:<hex>` over names and contents in order of name."""
        return "sha256:" + hashlib.sha256(self.pack()).hexdigest()

    def pack(self) -> bytes:
        """One byte string: for each file in order of name its name and content, each after a 8-byte length."""
        out = bytearray()
        for name in sorted(self.files):
            for part in (name.encode(), self.files[name]):
                out += struct.pack("<Q", len(part)) + part
        return bytes(out)

    @classmethod
    def unpack(cls, data: bytes) -> Bundle:
        """The inverse of pack. Raises ValueError for anything that pack does not write."""
        parts: list[bytes] = []
        at = 0
        while at < len(data):
            if at + 8 > len(data):
                raise ValueError("bundle is cut short")
            (size,) = struct.unpack_from("<Q", data, at)
            at += 8
            if at + size > len(data):
                raise ValueError("bundle is cut short")
            parts.append(data[at : at + size])
            at += size
        if len(parts) % 2:
            raise ValueError("bundle has a name without content")
        return cls({parts[i].decode(): parts[i + 1] for i in range(0, len(parts), 2)})

    def save(self, folder: Path) -> None:
        """Write into `folder`, whole or not at all; a folder that exists is left as it is."""
        if folder.exists():
            return
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".bundle-") as scratch:
            staged = Path(scratch) / "files"
            staged.mkdir()
            for name, content in self.files.items():
                (staged / name).write_bytes(content)
            try:
                staged.rename(folder)
            except OSError:
                if not folder.exists():  # another process won the race: its content is the same by digest
                    raise

    @classmethod
    def load(cls, folder: Path) -> Bundle:
        """Read what `save` wrote."""
        return cls({p.name: p.read_bytes() for p in sorted(folder.iterdir()) if p.is_file()})
