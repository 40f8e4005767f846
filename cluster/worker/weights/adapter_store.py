"""The adapters on a node's disk. Each adapter is fetched from its source, copied, checked, and kept in its own folder.

An adapter's folder is `adapters/<digest>` below the cache folder. The engine's prefix cache distinguishes adapters by
name and path, so equal paths must mean equal weights. Invariants: an adapter is copied before it is checked, so that a
change of its source after the check has no effect; a folder gets its digest as name only when it is complete; only this
user can read and write the folder. The folders are never removed after use, since other replicas of the node may use
them.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, Final

from cluster.api.adapters import AdapterSpec
from cluster.policy.catalog.allowed_sources import is_allowed_source
from cluster.process.private_files import make_private_folder
from cluster.worker.weights.adapter import (
    CONFIG,
    FILES,
    MAX_CONFIG_BYTES,
    PIECE_BYTES,
    WEIGHTS,
    AdapterError,
    Shapes,
    adapter_digest,
    base_shapes,
    check_adapter,
    most_weight_bytes,
    open_regular,
)
from cluster.worker.weights.fetching import SCHEMES, fetch
from cluster.worker.weights.model_card import MAX_CARD_BYTES, read_card, why_refused
from cluster.worker.weights.sources import SourceRules, from_hub
from cluster.worker.weights.web import FetchError

ABANDONED_S: Final = 86_400.0
"""Age in seconds after which the files of an unfinished fetch are removed."""
CARD: Final = "README.md"
_PART: Final = ".part-"
_REFUSED: Final = ".refused"


@dataclass(frozen=True, slots=True)
class StoredAdapter:
    """An adapter on this node's disk, checked against the base model."""

    digest: str
    folder: Path


@dataclass(eq=False, slots=True)
class AdapterStore:
    """The adapters of one model on this node.

    `base`: folder of the base model. It is None for a simulated engine, which reads no weights; then only digest and
    license are checked. `max_rank`: the engine's max_lora_rank.
    """

    rules: SourceRules
    base: Path | None
    max_rank: int
    _shapes: Shapes = field(default_factory=dict)

    @property
    def root(self) -> Path:
        """The folder that contains the folders of all adapters."""
        return self.rules.cache_dir / "adapters"

    def fetch(self, spec: AdapterSpec, progress: Callable[[], None] = lambda: None) -> StoredAdapter:
        """Fetch an adapter if it is not on this node's disk yet, and check it. Calls `progress` when a part has been
        downloaded or copied.

        Blocks. Raises AdapterError, SourceError or OSError.
        """
        if not is_allowed_source(spec.source, self.rules.allowed_sources):
            raise AdapterError(f"adapters[{spec.name}].source is not among weights.allow.sources")
        if self.base is not None and not self._shapes:
            self._shapes = base_shapes(self.base)
        make_private_folder(self.root)
        self._remove_abandoned()
        if spec.digest and self._is_whole(spec.digest):
            self._check(spec, self.root / spec.digest)
            return StoredAdapter(spec.digest, self.root / spec.digest)
        part = Path(tempfile.mkdtemp(prefix=_PART, dir=self.root))
        try:
            with self._source_folder(spec, part, progress) as source:
                self._copy(source, part, progress)
            progress()
            digest = self._check(spec, part)
            if not self._is_whole(digest):
                try:
                    os.rename(part, self.root / digest)
                except OSError:
                    if not self._is_whole(digest):  # otherwise another replica of this node was faster
                        raise
            return StoredAdapter(digest, self.root / digest)
        finally:
            shutil.rmtree(part, ignore_errors=True)

    def _is_whole(self, digest: str) -> bool:
        """Return whether the store has this adapter with unchanged files.

        If the files have changed, the folder is removed.
        """
        folder = self.root / digest
        if not folder.is_dir():
            return False
        with contextlib.suppress(AdapterError):
            if adapter_digest(folder) == digest:
                return True
        shutil.rmtree(folder, ignore_errors=True)
        return False

    def mark_corrupting(self, digest: str, reason: str) -> None:
        """Record that loading this adapter has corrupted an engine, so that no other replica of this node loads it."""
        (self.root / f"{digest}{_REFUSED}").write_text(reason[:2000], errors="replace")

    def _check(self, spec: AdapterSpec, folder: Path) -> str:
        """Check the adapter in a folder of the store; return the digest of its files."""
        where = f"adapters[{spec.name}]"
        try:
            if self.base is None:
                digest = adapter_digest(folder)
            else:
                digest = check_adapter(folder, self._shapes, self.max_rank).digest
        except AdapterError as error:  # the copy's path means nothing to a reader
            raise AdapterError(str(error).replace(str(folder), where)) from None
        if spec.digest not in ("", digest):
            raise AdapterError(
                f"{where}.digest: the files have {digest}, and {spec.digest} is required: replace the files in the "
                "source, or set digest to what they have"
            )
        allowed = tuple(self.rules.allowed_licenses)
        if allowed and (why := why_refused(spec.license, read_card(folder), allowed)):
            raise AdapterError(f"{where}.license: {why}")
        mark = self.root / f"{digest}{_REFUSED}"
        if mark.exists():
            raise AdapterError(
                f"{where}: an engine failed when it loaded these files ({mark.read_text()[:300]}); to try again, "
                f"remove {mark}"
            )
        return digest

    @contextmanager
    def _source_folder(self, spec: AdapterSpec, part: Path, progress: Callable[[], None]) -> Iterator[Path]:
        """Yield a folder with the adapter's files from its source.

        `part`: folder below which files may be downloaded.
        """
        most_bytes = self._most_bytes()

        def report(fetched: int, total: int, what: str) -> None:
            progress()

        where = f"adapters[{spec.name}].source"
        scheme, separator, rest = spec.source.partition("://")
        if not separator:
            folder = Path(spec.source).expanduser()
            if not folder.is_dir():
                raise AdapterError(f"{where}: there is no folder {folder}; use a folder or hf://org/name")
            yield folder
        elif scheme == "hf":
            name, _, revision = rest.partition("@")
            yield from_hub(where, name, revision, (*FILES, CARD), self.rules, report, most_bytes)
        elif scheme in SCHEMES:
            names = (*FILES, CARD)
            fetched = part / "fetched"
            try:
                yield fetch(
                    spec.source,
                    fetched,
                    names,
                    report,
                    needed=CONFIG,
                    web_names=names,
                    most_bytes=most_bytes,
                    allowed_sources=self.rules.allowed_sources,
                )
            except FetchError as error:
                raise AdapterError(f"{where}: {error}") from error
            finally:
                shutil.rmtree(fetched, ignore_errors=True)
        else:
            known = ", ".join(f"{name}://" for name in SCHEMES)
            raise AdapterError(f"{where} is unknown; use a folder, hf://org/name or {known}")

    def _most_bytes(self) -> Mapping[str, int]:
        """Return the largest allowed size, in bytes, of each file that is copied."""
        weights = most_weight_bytes(self._shapes, self.max_rank) if self._shapes else 1 << 30
        return {CONFIG: MAX_CONFIG_BYTES, WEIGHTS: weights, CARD: MAX_CARD_BYTES}

    def _copy(self, source: Path, target: Path, progress: Callable[[], None]) -> None:
        """Copy the adapter's two files and its model card, and nothing else.

        Only links in the hub's cache are followed. Without a licence rule, a card that cannot be opened is left out.
        """
        hub = (self.rules.cache_dir / "hub").resolve()
        for name, most in self._most_bytes().items():
            file = source / name
            if name == CARD and not file.is_file():
                continue
            if file.is_symlink() and file.resolve().is_relative_to(hub) and source.resolve().is_relative_to(hub):
                file = file.resolve()
            with contextlib.ExitStack() as opened:
                try:
                    stream = opened.enter_context(open_regular(file.parent, file.name, most))
                except AdapterError:
                    if name == CARD and not self.rules.allowed_licenses:
                        continue
                    raise
                self._write(stream, target / name, progress)

    def _write(self, stream: BinaryIO, target: Path, progress: Callable[[], None]) -> None:
        size = os.fstat(stream.fileno()).st_size
        if (free := shutil.disk_usage(target.parent).free) < size:
            raise AdapterError(f"the disk is full: {size} bytes are needed at {target.parent} and {free} are free")
        descriptor = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with open(descriptor, "wb") as out:
            left = size
            while left > 0 and (piece := stream.read(min(left, PIECE_BYTES))):
                out.write(piece)
                left -= len(piece)
                progress()

    def _remove_abandoned(self) -> None:
        for folder in self.root.glob(f"{_PART}*"):
            try:
                if time.time() - folder.stat().st_mtime > ABANDONED_S:
                    shutil.rmtree(folder, ignore_errors=True)
            except FileNotFoundError:  # another replica of this node has removed it, or has finished
                continue
