"""Modules of embedding models in sentence-transformers' layout: modules.json, and a folder for each module.

Problem: the settings in these folders (`1_Pooling/config.json`) determine how vLLM pools. Without them vLLM pools
differently, and every vector is wrong although there is no error. So the folders are fetched, included in the digest,
and required.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

MODULES = "modules.json"
FILES = ("config.json", "model.safetensors")
"""Files that a module's folder may have."""
SETTINGS = (MODULES, "sentence_bert_config.json", "config_sentence_transformers.json")
"""Files besides config.json that determine how an embedding model treats texts."""
MAX_MODULES = 16
_CONFIGURED = ("Pooling", "Dense")
"""Kinds of modules that need a config.json. Without it, the vectors are wrong."""
_FOLDER = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")


def module_folders(content: bytes) -> Sequence[str]:
    """Return the names of the modules' folders. `content`: content of a modules.json.

    Raises ValueError for content that is not a list of modules, and for a folder that is not a plain name.
    """
    return [folder for _, folder in _modules(content) if folder]


def _modules(content: bytes) -> Sequence[tuple[str, str]]:
    """Return the kind and the folder of each module. `content`: content of a modules.json."""
    try:
        modules = json.loads(content)
        listed = modules["modules"] if isinstance(modules, dict) else modules
        pairs = [(str(module["type"]).rpartition(".")[2], str(module.get("path", ""))) for module in listed]
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{MODULES} is not a list of modules with type and path: fetch or copy it again") from None
    if len(pairs) > MAX_MODULES:
        raise ValueError(f"{MODULES} has {len(pairs)} modules; at most {MAX_MODULES} are read")
    for _, folder in pairs:
        if folder and not _FOLDER.fullmatch(folder):
            raise ValueError(f"{MODULES} names the folder {folder[:64]!r}; it must be letters, digits, '_' and '-'")
    return pairs


def check_modules(folder: Path) -> None:
    """Raise ValueError if a model's folder lacks the settings of a module that changes its vectors."""
    try:
        content = (folder / MODULES).read_bytes()
    except FileNotFoundError:
        return
    for kind, name in _modules(content):
        if kind in _CONFIGURED and not (folder / name / "config.json").is_file():
            raise ValueError(
                f"{folder} lacks {name}/config.json, which {MODULES} names: without it every vector would be wrong. "
                "Fetch or copy the model again, subfolders included"
            )


def module_files(folder: Path) -> Sequence[Path]:
    """Return the files in a model's folder that determine how the model pools: the model's own settings, and the files
    of its modules."""
    try:
        folders = module_folders((folder / MODULES).read_bytes())
    except (OSError, ValueError):
        return ()
    own = [folder / name for name in SETTINGS]
    return [file for file in (*own, *(folder / sub / name for sub in folders for name in FILES)) if file.is_file()]
