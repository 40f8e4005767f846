"""Checks that the files of a model's folder can be read: each is a regular file, and each JSON file has a JSON object.

Problem: reading a named pipe waits for ever, reading a device never ends, and a link to nothing looks like a file that
the model does not need, for which another default then applies. So each entry of the folder that the engine or a
tokenizer may read is looked at before anything is read.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from cluster.worker.weights.vocabulary import MAX_JSON_BYTES, read_bounded, read_json

READ_SUFFIXES: Final = (".json", ".safetensors", ".bin", ".pt", ".pth", ".model", ".tiktoken", ".txt", ".jinja", ".md")
"""Ends of the names of files that are read by name."""
MAX_ENTRIES: Final = 20_000
AGAIN: Final = "fetch or copy it again"
_KINDS: Final = (
    (stat.S_ISFIFO, "a named pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)
_OBJECTS: Final = ("config.json", "generation_config.json", "tokenizer_config.json", "special_tokens_map.json")


def check_readable(folder: Path) -> None:
    """Raise ValueError if a file that may be read is no regular file, or if a file of settings has no JSON object. Only
    the settings are read."""
    for count, entry in enumerate(_entries(folder)):
        if count > MAX_ENTRIES:
            raise ValueError(f"{folder} has more than {MAX_ENTRIES} entries: keep only the model's files there")
        if fault := _fault(entry):
            raise ValueError(f"{entry.path} is {fault}, not a regular file; {AGAIN}")
    for name in _OBJECTS:
        read_json(folder / name)
    template = folder / "chat_template.jinja"
    try:
        read_bounded(template, MAX_JSON_BYTES).decode()
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as error:
        raise ValueError(f"{template} cannot be read as text: {error}; {AGAIN}") from None


def _entries(folder: Path) -> Iterator[os.DirEntry[str]]:
    """Yield the entries of the folder and of its own folders (modules of sentence-transformers, more templates)."""
    with os.scandir(folder) as here:
        for entry in here:
            yield entry
            if entry.is_dir(follow_symlinks=False):
                with os.scandir(entry.path) as below:
                    yield from below


def _fault(entry: os.DirEntry[str]) -> str:
    """Return what an entry is if it cannot be read as a file although its name asks for it; else an empty text."""
    is_read = entry.name.endswith(READ_SUFFIXES)
    try:
        mode = entry.stat().st_mode
    except FileNotFoundError:
        return "a link to a file that does not exist" if is_read else ""
    except OSError as error:
        if not is_read:
            return ""
        return "a link to itself" if error.errno == errno.ELOOP else f"unreadable ({error.strerror})"
    if stat.S_ISREG(mode) or not is_read:
        return ""
    return next((kind for is_kind, kind in _KINDS if is_kind(mode)), "no file")
