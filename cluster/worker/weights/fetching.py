"""Download of weights from object stores and web servers (s3://, gs://, https://, http://), once per node.

Problem: several replicas of a node may start at once, a process may be killed in the middle of forty gigabytes, the
disk may be full, and a model may be replaced or only half uploaded. Invariants: only one process of a node fetches a
model, and the others wait for it. Bytes that have arrived are not fetched again while the source reports the same
version of their file, and never continued otherwise. A folder is complete only when every file has the size that the
source reported, the source still lists the same files, and the caller's check has passed. A complete folder is used
without network access.
"""

from __future__ import annotations

import errno
import fcntl
import fnmatch
import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from cluster.worker.weights import sentence_modules
from cluster.worker.weights.checkpoint import INDEX, MAX_INDEX_BYTES, listed, read_index
from cluster.worker.weights.web import FetchError, Pace, RemoteFile, WebFolder

SCHEMES = {"s3": "s3fs", "gs": "gcsfs", "http": "aiohttp", "https": "aiohttp"}
"""URL schemes, each with the package that is needed for it."""
CHUNK_BYTES = 4 << 20
COMPLETE = ".complete.json"
LISTED = ".listed.json"
"""File with the version of each file that is being fetched."""
WEB_NAMES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "tokenizer.model",
    "tekken.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
    "README.md",
    INDEX,
    *sentence_modules.SETTINGS,
)
"""Files to try on a web server, whose files cannot be listed. Weights are the files in the index, or a single file."""
STORE_OPTIONS: Mapping[str, Any] = {"use_listings_cache": False}
"""fsspec's options for an object store. fsspec keeps one file system per process, and those of s3:// and gs:// would
keep each listing for ever: files that are uploaded or replaced later would be missing, or have their old sizes."""
VERSION_KEYS: Final = ("VersionId", "generation", "ETag", "etag", "LastModified", "updated", "created", "mtime")
"""Keys of a store's listing that change with a file's content."""
TRIES = 3
STORE_CALL_S = 60.0
"""Longest time in seconds of one request to an object store, which fetches at most CHUNK_BYTES."""

Progress = Callable[[int, int, str], None]
"""Callback with the arguments (bytes fetched, bytes in all, file name)."""


def free_bytes(folder: Path) -> int:
    """Return the number of free bytes on the disk of `folder`."""
    return shutil.disk_usage(folder).free


def fetch(
    source: str,
    root: Path,
    patterns: Sequence[str],
    progress: Progress | None = None,
    *,
    chunk_bytes: int = CHUNK_BYTES,
    free: Callable[[Path], int] = free_bytes,
    needed: str = "config.json",
    web_names: Sequence[str] = (),
    most_bytes: Mapping[str, int] | None = None,
    allowed_sources: Sequence[str] = ("*",),
    check: Callable[[Path], None] = lambda _: None,
    pace: Pace = Pace(),  # noqa: B008 - frozen
) -> Path:
    """Fetch the files of `source` whose names match one of `patterns`. Returns their folder below `root`. Blocks the
    thread, which must have no event loop. Raises FetchError.

    `needed`: a file that the source must have. `web_names`: names of the files to request from a web server, which
    cannot list its files; if it is empty, the usual names of a model's files are requested. `most_bytes`: largest
    allowed size of a file, by name; if one file is larger, no file is fetched. `allowed_sources`: patterns of the
    addresses to which redirects may lead. `check`: raises ValueError for a folder that is not whole; then the next call
    lists the source again.
    """
    target = root / hashlib.sha256(source.encode()).hexdigest()[:32]
    target.mkdir(parents=True, exist_ok=True)
    with locked(target.with_suffix(".lock")):
        if _complete(target, check):
            return target
        with _opened(source, web_names, chunk_bytes, allowed_sources, pace) as folder:
            files = _files_of(folder, patterns, needed)
            for name, most in (most_bytes or {}).items():
                if name in files and files[name].size > most:
                    raise FetchError(f"{name} has {files[name].size} bytes, at most {most} are allowed")
            _forget_changed(target, files)
            _check_space(target, files, free(target))
            total, done = sum(file.size for file in files.values()), 0
            for name, file in sorted(files.items()):

                def report(fetched: int, before: int = done, name: str = name) -> None:
                    if progress is not None:
                        progress(before + fetched, total, name)

                _fetch_file(folder, name, file, target / name, report)
                done += file.size
            if _files_of(folder, patterns, needed) != files:
                raise FetchError("its files changed while they were fetched; try again when the upload is complete")
        check(target)
        sizes = {name: file.size for name, file in files.items()}
        (target / COMPLETE).write_text(json.dumps({"source": source, "sizes": sizes}))
    return target


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a lock file while the context is open. Other processes wait for it.

    If this process dies, the kernel releases the lock.
    """
    with path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _complete(target: Path, check: Callable[[Path], None]) -> bool:
    try:
        sizes = json.loads((target / COMPLETE).read_text())["sizes"]
        if all((target / name).stat().st_size == size for name, size in sizes.items()):
            check(target)
            return True
    except (OSError, ValueError, KeyError, AttributeError):
        pass
    (target / COMPLETE).unlink(missing_ok=True)
    return False


def _forget_changed(target: Path, files: Mapping[str, RemoteFile]) -> None:
    """Remove fetched files and parts that belong to another version of the source, or to none that is known."""
    record = target / LISTED
    try:
        fetched = dict(json.loads(record.read_text()))
    except (OSError, ValueError, TypeError):
        fetched = {}
    for name, file in files.items():
        if not file.version or fetched.get(name) != [file.size, file.version]:
            for here in (target / name, _part(target / name)):
                here.unlink(missing_ok=True)
    for here in target.iterdir():  # files that the source no longer has would be read as part of the model
        if here.is_file() and not here.name.startswith(".") and here.name.removesuffix(".part") not in files:
            here.unlink()
    record.write_text(json.dumps({name: [file.size, file.version] for name, file in files.items()}))


def _part(target: Path) -> Path:
    return target.with_name(target.name + ".part")


@contextmanager
def _opened(
    source: str, web_names: Sequence[str], chunk_bytes: int, allowed_sources: Sequence[str], pace: Pace
) -> Iterator[_Web | _Store]:
    """Yield the folder of a source. An error of its file system is raised as FetchError."""
    scheme = source.partition("://")[0]
    try:
        if scheme in ("http", "https"):
            with WebFolder(source.rstrip("/"), allowed_sources, pace) as web:
                yield _Web(web, web_names)
        else:
            import fsspec

            system, path = fsspec.core.url_to_fs(source.rstrip("/"), **STORE_OPTIONS)
            yield _Store(system, path, chunk_bytes)
    except ImportError:
        raise FetchError(f"{scheme}:// needs the package {SCHEMES[scheme]}: install it on every node") from None


class _Web:
    """A model's folder on a web server, which cannot list its files: a list of names is requested instead."""

    def __init__(self, web: WebFolder, names: Sequence[str]) -> None:
        self._web, self._names = web, names
        self.copy, self.read = web.copy, web.read

    def files(self) -> Mapping[str, RemoteFile]:
        self._names = self._names or self._model_names()
        return self._web.list(self._names)

    def _model_names(self) -> Sequence[str]:
        """Return the names of a model's files: those in WEB_NAMES, its weight files, and its modules' files."""
        index = self._web.read(INDEX, MAX_INDEX_BYTES)
        weights = ["model.safetensors"] if index is None else sorted(set(read_index(index).values()))
        modules = self._web.read(sentence_modules.MODULES, sentence_modules.MAX_BYTES)
        folders = () if modules is None else sentence_modules.module_folders(modules)
        return [*WEB_NAMES, *weights, *(f"{folder}/{name}" for folder in folders for name in sentence_modules.FILES)]


class _Store:
    """A model's folder in an object store, or in another file system of fsspec."""

    def __init__(self, system: Any, path: str, chunk_bytes: int) -> None:
        self._system, self._path, self._chunk_bytes = system, path, chunk_bytes

    def files(self) -> Mapping[str, RemoteFile]:
        found = dict(self._list(self._path))
        if sentence_modules.MODULES in found:
            modules = self.read(sentence_modules.MODULES, sentence_modules.MAX_BYTES)
            for folder in sentence_modules.module_folders(modules):
                try:
                    below = dict(self._list(f"{self._path}/{folder}"))
                except FileNotFoundError:
                    continue  # a module without settings has no folder
                found |= {f"{folder}/{name}": below[name] for name in sentence_modules.FILES if name in below}
        return found

    def _list(self, path: str) -> Iterator[tuple[str, RemoteFile]]:
        for entry in self._call("ls", path, detail=True):
            name = entry["name"].rsplit("/", 1)[-1]
            if entry["type"] == "file" and not name.startswith("."):
                version = " ".join(f"{key}={entry[key]}" for key in VERSION_KEYS if entry.get(key))
                yield name, RemoteFile(entry["name"], int(entry["size"]), version)

    def read(self, name: str, most: int) -> bytes:
        content = self._range(f"{self._path}/{name}", 0, most + 1)
        if len(content) > most:
            raise FetchError(f"{name} has more than {most} bytes")
        return content

    def copy(self, name: str, file: RemoteFile, part: Path, report: Callable[[int], None]) -> None:
        fetched = part.stat().st_size if part.exists() else 0
        with part.open("ab") as out:
            while fetched < file.size:
                data = self._range(file.path, fetched, min(fetched + self._chunk_bytes, file.size))
                if not data:
                    raise OSError(f"it ended after {fetched} of {file.size} bytes")
                out.write(data)
                fetched += len(data)
                report(fetched)

    def _range(self, path: str, start: int, end: int) -> bytes:
        data: bytes = self._call("cat_file", path, start=start, end=end)
        if len(data) > end - start:
            raise FetchError(f"{path.rsplit('/', 1)[-1]}: the store ignores the range of a request")
        return data

    def _call(self, method: str, *args: Any, **named: Any) -> Any:
        if not getattr(self._system, "async_impl", False):
            return getattr(self._system, method)(*args, **named)
        import fsspec

        call = getattr(self._system, f"_{method}")
        return fsspec.asyn.sync(self._system.loop, call, *args, timeout=STORE_CALL_S, **named)


def _files_of(folder: _Web | _Store, patterns: Sequence[str], needed: str) -> Mapping[str, RemoteFile]:
    """Return the files that match a pattern, by name. Raises FetchError, also if the index names files that are not
    there."""
    try:
        found = folder.files()
        index = folder.read(INDEX, MAX_INDEX_BYTES) if INDEX in found and needed == "config.json" else None
        lacking = [] if index is None else sorted(set(read_index(index).values()) - set(found))
    except FetchError:
        raise
    except FileNotFoundError:
        raise FetchError("there is nothing at this address") from None
    except Exception as error:  # each file system has its own errors
        raise FetchError(f"cannot be listed: {_first_line(error)}") from error
    files = {
        name: file for name, file in found.items() if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
    }
    if lacking:
        raise FetchError(f"{INDEX} names {listed(lacking)}, not there: wait until the upload is complete, or repeat it")
    if needed not in files:
        raise FetchError(
            f"there is no {needed} at this address; it is no folder of a model or adapter, or access is refused"
        )
    return files


def _check_space(target: Path, files: Mapping[str, RemoteFile], free: int) -> None:
    fetched = sum(file.stat().st_size for file in target.iterdir() if file.is_file())
    need = sum(file.size for file in files.values()) - fetched
    if need > free:
        raise FetchError(_disk_full_message(target, need, free))


def _disk_full_message(target: Path, need: int, free: int) -> str:
    return (
        f"the disk is full: {need / 1e9:.2f} GB more are needed at {target} and {free / 1e9:.2f} GB are free; "
        "free some space, or set weights.cache_dir"
    )


def _fetch_file(
    folder: _Web | _Store, name: str, file: RemoteFile, target: Path, report: Callable[[int], None]
) -> None:
    if target.exists() and target.stat().st_size == file.size:
        report(file.size)
        return
    target.parent.mkdir(exist_ok=True)
    part = _part(target)
    for number in range(TRIES):
        if part.exists() and (not file.version or part.stat().st_size > file.size):
            part.unlink()
        try:
            folder.copy(name, file, part, report)
            break
        except FetchError:
            raise
        except OSError as error:
            if error.errno == errno.ENOSPC:
                missing = file.size - part.stat().st_size
                raise FetchError(_disk_full_message(target.parent, missing, free_bytes(target.parent))) from None
            broken: Exception = error
        except Exception as error:  # each file system has its own errors
            broken = error
        if number == TRIES - 1:
            raise FetchError(
                f"{name} broke off {TRIES} times: {_first_line(broken)}; the fetched part is kept for the next try"
            ) from broken
    part.replace(target)


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]
