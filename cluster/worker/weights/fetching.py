"""Download of weights from object stores and web servers (s3://, gs://, https://, http://), once per node.

Problem: several replicas of a node may start at once, a process may be killed in the middle of forty gigabytes, and the
disk may be full. Invariants: only one process of a node fetches a model, and the others wait for it. If the server
supports ranges, bytes that have arrived are not fetched again. A folder is complete only when every file has the size
that the server reported. A complete folder is used without network access.
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
from typing import Any

from cluster.worker.weights import sentence_modules

SCHEMES = {"s3": "s3fs", "gs": "gcsfs", "http": "aiohttp", "https": "aiohttp"}
"""URL schemes, each with the package that fsspec needs for it."""
CHUNK_BYTES = 4 << 20
COMPLETE = ".complete.json"
INDEX = "model.safetensors.index.json"
WEB_NAMES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "tokenizer.model",
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
TRIES = 3
CONNECT_S, READ_S = 30.0, 60.0
"""Longest time in seconds for a connection to a web server, and between two reads from it."""

Progress = Callable[[int, int, str], None]
"""Callback with the arguments (bytes fetched, bytes in all, file name)."""


class FetchError(ValueError):
    """An error for a model that cannot be fetched. The message has the reason and the remedy."""


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
) -> Path:
    """Fetch the files of `source` whose names match one of `patterns`. Returns their folder below `root`. Blocks the
    thread. Raises FetchError.

    `needed`: a file that the source must have. `web_names`: names of the files to request from a web server, which
    cannot list its files; if it is empty, the usual names of a model's files are requested. `most_bytes`: largest
    allowed size of a file, by name; if one file is larger, no file is fetched.
    """
    target = root / hashlib.sha256(source.encode()).hexdigest()[:32]
    target.mkdir(parents=True, exist_ok=True)
    with locked(target.with_suffix(".lock")):
        if _complete(target):
            return target
        files = _files_of(source, patterns, needed, web_names)
        for name, most in (most_bytes or {}).items():
            if name in files and files[name][2] > most:
                raise FetchError(f"{name} has {files[name][2]} bytes, at most {most} are allowed")
        _check_space(target, files, free(target))
        sizes = {name: size for name, (_, _, size) in files.items()}
        total, done = sum(sizes.values()), 0
        for name, (system, path, size) in sorted(files.items()):

            def report(fetched: int, before: int = done, name: str = name) -> None:
                if progress is not None:
                    progress(before + fetched, total, name)

            _fetch_file(system, path, target / name, size, chunk_bytes, report)
            done += size
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


def _complete(target: Path) -> bool:
    try:
        sizes = json.loads((target / COMPLETE).read_text())["sizes"]
        return all((target / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, KeyError, AttributeError):
        return False


def _files_of(
    source: str, patterns: Sequence[str], needed: str, web_names: Sequence[str]
) -> Mapping[str, tuple[Any, str, int]]:
    """Return the files that match a pattern, by name. Each value is (file system, path, size). Raises FetchError."""
    scheme = source.partition("://")[0]
    try:
        import fsspec

        is_web = scheme in ("http", "https")
        system, path = fsspec.core.url_to_fs(source.rstrip("/"), **(_web_options() if is_web else STORE_OPTIONS))
        names = _list_web(system, path, web_names or _web_names(system, path)) if is_web else _list_store(system, path)
        files = {
            name: (system, where, size)
            for name, where, size in names
            if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
        }
    except ImportError:
        raise FetchError(f"{scheme}:// needs the package {SCHEMES[scheme]}: install it on every node") from None
    except FileNotFoundError:
        raise FetchError("there is nothing at this address") from None
    except Exception as error:  # each file system has its own errors
        raise FetchError(f"cannot be listed: {_first_line(error)}") from error
    if needed not in files:
        raise FetchError(
            f"there is no {needed} at this address; it is no folder of a model or adapter, or access is refused"
        )
    return files


def _web_options() -> Mapping[str, Any]:
    """Return fsspec's options for a web server: time limits for each connection and for each pause between bytes."""
    import aiohttp

    return {"client_kwargs": {"timeout": aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_S, sock_read=READ_S)}}


def _list_store(system: Any, path: str) -> Iterator[tuple[str, str, int]]:
    for entry in system.ls(path, detail=True):
        if entry["type"] == "file":
            yield entry["name"].rsplit("/", 1)[-1], entry["name"], int(entry["size"])
    for folder in _module_folders(system, path):
        try:
            entries = system.ls(f"{path}/{folder}", detail=True)
        except FileNotFoundError:
            continue  # a module without settings has no folder
        for entry in entries:
            name = entry["name"].rsplit("/", 1)[-1]
            if entry["type"] == "file" and name in sentence_modules.FILES:
                yield f"{folder}/{name}", entry["name"], int(entry["size"])


def _module_folders(system: Any, path: str) -> Sequence[str]:
    """Return the folders of an embedding model's modules, from its modules.json; empty if there is none.

    Raises ValueError for an invalid modules.json.
    """
    try:
        content = system.cat_file(f"{path}/{sentence_modules.MODULES}")
    except FileNotFoundError:
        return ()
    return sentence_modules.module_folders(content)


def _web_names(system: Any, path: str) -> Sequence[str]:
    """Return the names of a model's files on a web server: those in WEB_NAMES, its weight files, and its modules'
    files."""
    names = list(WEB_NAMES)
    try:
        index = json.loads(system.cat_file(f"{path}/{INDEX}"))
        names += sorted({str(name).rsplit("/", 1)[-1] for name in index["weight_map"].values()})
    except FileNotFoundError:
        names.append("model.safetensors")
    names += [f"{folder}/{name}" for folder in _module_folders(system, path) for name in sentence_modules.FILES]
    return names


def _list_web(system: Any, path: str, names: Sequence[str]) -> Iterator[tuple[str, str, int]]:
    for name in names:
        try:
            size = system.info(f"{path}/{name}").get("size")
        except FileNotFoundError:
            continue
        if size is None:
            raise FetchError(f"the server does not report the size of {name}")
        yield name, f"{path}/{name}", int(size)


def _check_space(target: Path, files: Mapping[str, tuple[Any, str, int]], free: int) -> None:
    fetched = sum(file.stat().st_size for file in target.iterdir() if file.is_file())
    need = sum(size for _, _, size in files.values()) - fetched
    if need > free:
        raise FetchError(_disk_full_message(target, need, free))


def _disk_full_message(target: Path, need: int, free: int) -> str:
    return (
        f"the disk is full: {need / 1e9:.2f} GB more are needed at {target} and {free / 1e9:.2f} GB are free; "
        "free some space, or set weights.cache_dir"
    )


def _fetch_file(
    system: Any, path: str, target: Path, size: int, chunk_bytes: int, report: Callable[[int], None]
) -> None:
    if target.exists() and target.stat().st_size == size:
        report(size)
        return
    target.parent.mkdir(exist_ok=True)
    part = target.with_name(target.name + ".part")
    for number in range(TRIES):
        try:
            _copy(system, path, part, size, chunk_bytes, report)
            break
        except OSError as error:
            if error.errno == errno.ENOSPC:
                missing = size - part.stat().st_size
                raise FetchError(_disk_full_message(target.parent, missing, free_bytes(target.parent))) from None
            broken: Exception = error
        except Exception as error:  # each file system has its own errors
            broken = error
        if number == TRIES - 1:
            raise FetchError(
                f"{target.name} broke off {TRIES} times: {_first_line(broken)}; "
                "the fetched part is kept for the next try"
            ) from broken
    have = part.stat().st_size
    if have != size:
        part.unlink()
        raise FetchError(f"{target.name} has {have} bytes, but the server reported {size}; try again")
    part.replace(target)


def _copy(system: Any, path: str, part: Path, size: int, chunk_bytes: int, report: Callable[[int], None]) -> None:
    fetched = part.stat().st_size if part.exists() else 0
    if fetched > size:
        part.unlink()
        fetched = 0
    with part.open("ab") as out:
        while fetched < size:
            data = _range(system, path, fetched, min(fetched + chunk_bytes, size))
            if not data:
                raise OSError(f"it ended after {fetched} of {size} bytes")
            out.write(data)
            fetched += len(data)
            report(fetched)


def _range(system: Any, path: str, start: int, end: int) -> bytes:
    """Return the bytes in [start, end), even if the server ignores the range and returns the whole file."""
    data: bytes = system.cat_file(path, start=start, end=end)
    return data if len(data) <= end - start else data[start:end]


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]
