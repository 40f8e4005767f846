"""Locations of the secret files and of the ledger's database: the configured ones, else files in the cache folder."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cluster.config.schema import Config


def secret_files(config: Config) -> Mapping[str, Path]:
    """Return the paths of the secret files of the section `auth`, by the name of the setting. The default paths are in
    the cache folder. Without the section, there are no secret files."""
    if config.auth is None:
        return {}
    files = {"auth.cluster_secret_file": config.auth.cluster_secret_file or cache_dir() / "cluster-secret"}
    if config.auth.api_keys is not None:
        pepper = config.auth.api_keys.pepper_file
        files["auth.api_keys.pepper_file"] = pepper or cache_dir() / "key-pepper"
    return files


def database_url(config: Config) -> str:
    """Return the URL of the ledger's database: the configured URL, else the URL of `ledger.db` in the cache folder."""
    return config.store.database_url or f"sqlite:///{cache_dir() / 'ledger.db'}"


def cache_dir() -> Path:
    """Return the cache folder: the value of HEADRACE_CACHE_DIR, else `headrace` in the user's cache folder.

    The cache folder holds models made on this host, tokenizer bundles and the last catalog.
    """
    configured = os.environ.get("HEADRACE_CACHE_DIR")
    if configured:
        return Path(configured)
    return Path(os.environ.get("XDG_CACHE_HOME", str(Path.home() / ".cache"))) / "headrace"
