"""Sources of weights, and the rules for them.

A source is a folder, the Hugging Face hub, an object store, a web server or a demo model. By default only safetensors
files and no code are loaded, since other formats can run code when they are read. Other formats and code must be
allowed both by the catalog entry and by `weights.allow`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from cluster.api.types import ModelSpec
from cluster.policy.catalog.allowed_sources import is_allowed_source
from cluster.worker.weights import demo_model
from cluster.worker.weights.checkpoint import CheckpointError, check_files
from cluster.worker.weights.fetching import SCHEMES, Progress, fetch
from cluster.worker.weights.folder_files import check_readable
from cluster.worker.weights.hub_progress import reporting_bar
from cluster.worker.weights.model_card import read_card, why_refused
from cluster.worker.weights.sentence_modules import check_modules
from cluster.worker.weights.vocabulary import read_json, why_no_tokenizer
from cluster.worker.weights.web import FetchError

HUB_FILES = ("*.json", "*.safetensors", "*.txt", "*.model", "*.jinja", "*.tiktoken", "README.md")
"""Files to fetch from the hub: weights, configuration, tokenizer, templates, the model's card; never code."""

WEIGHT_PATTERNS = {
    "safetensors": ("*.safetensors",),
    "auto": ("*.safetensors", "*.bin", "*.pt"),
    "pt": ("*.bin", "*.pt"),
    "npcache": ("*.bin", "*.pt"),
    "dummy": (),
}
"""File patterns by load format. A folder needs at least one matching file; formats not listed here are not checked."""

DEMOS = " or ".join(demo_model.SOURCES)
NO_GGUF = "gguf files are not served yet; use the model's safetensors form"
_UNSAFE = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


class SourceError(ValueError):
    """An error for a source that cannot be used. The message names the entry, the reason and the remedy."""


@dataclass(frozen=True, slots=True)
class SourceRules:
    """Rules for the sources of model weights, from the configuration's section `weights`: where weights may come from,
    and which formats, licenses and code are allowed."""

    cache_dir: Path
    hub_endpoint: str = ""
    hub_token_file: Path | None = None
    allowed_sources: Sequence[str] = ("*",)
    allowed_formats: Sequence[str] = ("safetensors",)
    allow_remote_code: bool = False
    allowed_licenses: Sequence[str] = ()


def resolve(spec: ModelSpec, rules: SourceRules, progress: Progress | None = None) -> Path:
    """Return the local folder of a model, which is fetched or created if needed. Blocks. Raises SourceError."""
    where = f"models[{spec.name}].source"
    if not is_allowed_source(spec.source, rules.allowed_sources):
        raise SourceError(f"{where}: {spec.source!r} is not among weights.allow.sources")
    if spec.load_format not in rules.allowed_formats:
        raise SourceError(
            f"models[{spec.name}].load_format: {spec.load_format!r} is not among weights.allow.formats; "
            "formats other than safetensors can run code when they are read"
        )
    if spec.load_format == "gguf":
        raise SourceError(f"models[{spec.name}].load_format: {NO_GGUF}")
    scheme, separator, rest = spec.source.partition("://")
    if not separator:
        folder = Path(spec.source).expanduser()
        if not folder.is_dir():
            raise SourceError(f"{where}: there is no folder {folder}; use a folder, hf://org/name or {DEMOS}")
    elif scheme == "hf":
        wanted = [*HUB_FILES, *WEIGHT_PATTERNS.get(spec.load_format, ())]
        folder = from_hub(where, rest, spec.revision, wanted, rules, progress)
    elif spec.source in demo_model.SOURCES:
        try:
            folder = demo_model.ensure_demo_model(rules.cache_dir, progress, spec.source)
        except demo_model.DemoModelError as error:
            raise SourceError(f"{where}: {error}") from error
    elif scheme in SCHEMES:
        try:
            wanted = [*HUB_FILES, *WEIGHT_PATTERNS.get(spec.load_format, ())]
            folder = fetch(
                spec.source,
                rules.cache_dir / "fetched",
                wanted,
                progress,
                allowed_sources=rules.allowed_sources,
                check=partial(_check_whole, spec, rules),
            )
        except FetchError as error:
            raise SourceError(f"{where}: {spec.source}: {error}") from error
    else:
        known = ", ".join(f"{name}://" for name in SCHEMES)
        raise SourceError(f"{where}: {spec.source!r} is unknown; use a folder, hf://org/name, {known} or {DEMOS}")
    check_folder(spec, folder, allow_remote_code=rules.allow_remote_code)
    if why := why_refused(spec.license, read_card(folder), tuple(rules.allowed_licenses)):
        raise SourceError(f"models[{spec.name}].license: {why}")
    return folder


def from_hub(
    where: str,
    name: str,
    revision: str,
    patterns: Sequence[str],
    rules: SourceRules,
    progress: Progress | None = None,
    most_bytes: Mapping[str, int] | None = None,
) -> Path:
    """Fetch the files of a hub repository that match `patterns`. Returns their folder in the hub's cache. Blocks
    the thread.

    `where`: the key of the configuration that names the source, for errors. `name`: `organisation/name`.
    `revision`: "" for the newest. `most_bytes`: largest allowed size of a file, by name; if one file is
    larger, no file is fetched. Raises SourceError.
    """
    if name.count("/") != 1 or not all(name.split("/")):
        raise SourceError(f"{where}: expected hf://organisation/name, got {f'hf://{name}'!r}")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import DryRunError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    token = rules.hub_token_file.read_text().strip() if rules.hub_token_file else None
    offline = os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on")
    download = partial(
        snapshot_download,
        name,
        allow_patterns=list(patterns),
        endpoint=rules.hub_endpoint or None,
        token=token,
        cache_dir=rules.cache_dir / "hub",
        local_files_only=offline,
    )
    try:
        if most_bytes and not offline:
            with suppress(DryRunError):  # the hub cannot be reached: only files in its cache are used
                files = download(revision=revision or None, dry_run=True)
                _check_sizes(where, files, most_bytes)
                revision = files[0].commit_hash if files else revision
        bars = {} if progress is None else {"tqdm_class": reporting_bar(progress, name)}
        folder = download(revision=revision or None, **bars)
    except LocalEntryNotFoundError as error:
        why = "HF_HUB_OFFLINE is set" if offline else "the hub cannot be reached"
        raise SourceError(
            f"{where}: {name} is not in {rules.cache_dir / 'hub'} and {why}; "
            "fetch it on a connected machine, or set weights.hugging_face.endpoint to a mirror"
        ) from error
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise SourceError(
            f"{where}: {name} cannot be fetched: {first}; a gated model needs weights.hugging_face.token_file"
        ) from error
    return Path(folder)


def _check_sizes(where: str, files: Sequence[Any], most_bytes: Mapping[str, int]) -> None:
    """Raise SourceError if a file on the hub is larger than allowed. `files`: huggingface_hub's DryRunFileInfos."""
    for file in files:
        most = most_bytes.get(file.filename)
        if most is not None and (file.file_size is None or file.file_size > most):
            size = "an unknown number of" if file.file_size is None else file.file_size
            raise SourceError(f"{where}: {file.filename} has {size} bytes, at most {most} are allowed")


def revision_of(spec: ModelSpec, folder: Path) -> str:
    """Return the commit of a model that was fetched from the hub; "" for other sources.

    `folder`: the model's folder.
    """
    if not spec.source.startswith("hf://") or folder.parent.name != "snapshots":
        return ""
    return folder.name


def check_folder(spec: ModelSpec, folder: Path, *, allow_remote_code: bool = False) -> None:
    """Raise SourceError if the folder has no checkpoint, or a checkpoint that may not be loaded."""
    where = f"models[{spec.name}].source"
    try:
        check_readable(folder)
        if not (folder / "config.json").exists():
            raise ValueError(f"{folder} {_why_no_model(folder)}")
        config = read_json(folder / "config.json")
    except ValueError as error:
        raise SourceError(f"{where}: {error}") from None
    patterns = WEIGHT_PATTERNS.get(spec.load_format, ())
    if patterns and not any(any(folder.glob(pattern)) for pattern in patterns):
        unsafe = sorted(file.name for pattern in _UNSAFE for file in folder.glob(pattern))
        if unsafe:
            raise SourceError(
                f"{where}: {folder} holds {unsafe[0]} but no {spec.load_format} files; pickled weights can run code. "
                "Convert them to safetensors, or set load_format and weights.allow.formats"
            )
        if any(folder.glob("*.gguf")):
            raise SourceError(f"{where}: {folder} holds only gguf weights; {NO_GGUF}")
        raise SourceError(f"{where}: {folder} holds no weights ({', '.join(patterns)})")
    if config.get("auto_map") and not (spec.trust_remote_code and allow_remote_code):
        raise SourceError(
            f"{where}: {folder / 'config.json'} loads the model's own code (auto_map), which is refused; "
            f"if you trust it, set models[{spec.name}].trust_remote_code and weights.allow.remote_code"
        )
    try:
        check_modules(folder, pickled="*.bin" in patterns)
    except ValueError as error:
        raise SourceError(f"{where}: {error}") from error


def _check_whole(spec: ModelSpec, rules: SourceRules, folder: Path) -> None:
    """Raise SourceError if a fetched folder is no whole model, for example because its upload is not complete."""
    check_folder(spec, folder, allow_remote_code=rules.allow_remote_code)
    try:
        check_files(spec, folder)
        if why := why_no_tokenizer(folder, spec.trust_remote_code):
            raise CheckpointError(f"models[{spec.name}].source: {folder} {why}")
    except CheckpointError as error:
        raise SourceError(str(error).replace(str(folder), spec.source)) from None


def _why_no_model(folder: Path) -> str:
    """Return why a folder without config.json is not a model folder."""
    if any(folder.glob("*.gguf")):
        return f"is a folder of gguf files; {NO_GGUF}"
    if (folder / "params.json").exists():
        return (
            "has params.json and no config.json: it is in Mistral's own format, which is not served yet; use the "
            "model's Hugging Face form"
        )
    return "has no config.json; it is not a model folder"
