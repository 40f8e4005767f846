"""A tokenizer bundle: the files that a gateway needs for a model's tokens. The name of a bundle is its digest.

A worker or the controller makes a bundle from a model's folder (worker/weights/tokenizer_bundle.py). A gateway fetches
the bundle once, by digest, and keeps it on disk. A bundle holds only text files: tokenizer.json (the fast tokenizer as
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
ESCAPED_TOKENS, ESCAPE_SEPARATOR = "escaped_tokens", "escape_separator"
"""Keys in the bundle's tokenizer_config.json: the control tokens that a gateway escapes in the contents of messages,
and the character that it inserts to escape them. Absent if the model's `control_tokens_in_content` is `keep`."""
RENDERER = "renderer"
"""Key in the bundle's tokenizer_config.json: the renderer of vLLM that makes prompts of chats. It runs only in workers
(worker/rendering). Absent if the model has a chat template, which a gateway renders itself."""
TRUNCATION_SIDE, INPUT_NAMES = "truncation_side", "model_input_names"
"""Keys in the bundle's tokenizer_config.json, with transformers' names: the side on which a long input of a pooling
model is cut (absent: `right`), and the tokenizer's outputs (absent: token types are among them)."""
PLAIN_SAMPLING = {
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "temperature": 1.0,
    "top_k": 0,
    "top_p": 1.0,
    "min_p": 0.0,
}
"""The sampling values that a model's generation config can set, each with the value that changes nothing."""
MAX_TOKENS_LIMIT = "max_tokens_limit"
"""Key in an engine's sampling defaults: the number of tokens beyond which no call generates, whatever it asks for."""


def sampling_defaults(generation_config: Mapping[str, object]) -> dict[str, object]:
    """Return the sampling values of a generation_config.json that change the output. The key max_new_tokens becomes
    max_tokens.

    An engine applies a default value to each call that does not set the field.
    """
    values = {k: generation_config.get(k) for k, plain in PLAIN_SAMPLING.items() if generation_config.get(k) != plain}
    values = {k: value for k, value in values.items() if isinstance(value, (int, float))}
    max_new_tokens = generation_config.get("max_new_tokens")
    return values | ({"max_tokens": max_new_tokens} if isinstance(max_new_tokens, int) else {})


@dataclass(frozen=True, slots=True)
class Bundle:
    """The files of a bundle, by name. Names have no path separator. Equality and `digest` depend only on names and
    contents."""

    files: Mapping[str, bytes]

    def __post_init__(self) -> None:
        for name in self.files:
            if not name or name != os.path.basename(name) or name.startswith("."):
                raise ValueError(f"bundle file name {name!r} must be plain: no folders, no leading dot")

    @property
    def digest(self) -> str:
        """The digest of the packed bundle, as `sha256:<hex>`."""
        return "sha256:" + hashlib.sha256(self.pack()).hexdigest()

    def pack(self) -> bytes:
        """Serialize the files, sorted by name. Before each name and each content comes its length (8 bytes,
        little-endian)."""
        out = bytearray()
        for name in sorted(self.files):
            for part in (name.encode(), self.files[name]):
                out += struct.pack("<Q", len(part)) + part
        return bytes(out)

    @classmethod
    def unpack(cls, data: bytes) -> Bundle:
        """Decode a packed bundle, the inverse of `pack`. Raises ValueError for invalid data."""
        parts: list[bytes] = []
        at = 0
        while at < len(data):
            if at + 8 > len(data):
                raise ValueError("invalid bundle: truncated")
            (size,) = struct.unpack_from("<Q", data, at)
            at += 8
            if at + size > len(data):
                raise ValueError("invalid bundle: truncated")
            parts.append(data[at : at + size])
            at += size
        if len(parts) % 2:
            raise ValueError("invalid bundle: a name without content")
        return cls({parts[i].decode(): parts[i + 1] for i in range(0, len(parts), 2)})

    def save(self, folder: Path) -> None:
        """Write the files into `folder` atomically. Does nothing if the folder exists."""
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
                if not folder.exists():  # otherwise another process wrote the same content first
                    raise

    @classmethod
    def load(cls, folder: Path) -> Bundle:
        """Read a folder that `save` wrote."""
        return cls({p.name: p.read_bytes() for p in sorted(folder.iterdir()) if p.is_file()})
