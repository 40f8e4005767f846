"""Weights are downloaded over HTTP once per node. A download that broke off is resumed at the same byte."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.registry import _registry as file_systems

from cluster.api.adapters import AdapterSpec
from cluster.api.types import ModelSpec
from cluster.worker.weights import fetching
from cluster.worker.weights.adapter import CONFIG, WEIGHTS, AdapterError
from cluster.worker.weights.adapter_store import AdapterStore
from cluster.worker.weights.fetching import FetchError, fetch
from cluster.worker.weights.sources import SourceError, SourceRules, resolve

pytestmark = pytest.mark.slow

PATTERNS = ("*.json", "*.safetensors", "README.md")
SHARD = bytes(range(256)) * 40
FILES = {
    "config.json": b"{}",
    "model.safetensors.index.json": json.dumps(
        {"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}
    ).encode(),
    "one.safetensors": SHARD,
    "two.safetensors": SHARD[::-1],
}


@dataclass
class Server:
    """A web server that supports ranges. `breaks`: number of downloads of weights that the server will break off."""

    files: dict[str, bytes]
    breaks: int = 0
    asked: list[str] = field(default_factory=list)
    sent: int = 0
    address: str = ""

    def handler(self) -> type[BaseHTTPRequestHandler]:
        """Return the request handler class for http.server."""
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_HEAD(self) -> None:
                self._answer(body=False)

            def do_GET(self) -> None:
                self._answer(body=True)

            def _answer(self, *, body: bool) -> None:
                name = self.path.partition("/models/m/")[2]
                content = server.files.get(name)
                if content is None:
                    self.send_error(404)
                    return
                ranged = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
                start, end = (int(ranged[1]), int(ranged[2]) + 1) if ranged else (0, len(content))
                part = content[start:end]
                self.send_response(206 if ranged else 200)
                self.send_header("Content-Length", str(len(part)))
                self.send_header("Accept-Ranges", "bytes")
                if ranged:
                    self.send_header("Content-Range", f"bytes {start}-{start + len(part) - 1}/{len(content)}")
                self.end_headers()
                if not body:
                    return
                server.asked.append(name)
                if name.endswith(".safetensors") and server.breaks:
                    server.breaks -= 1
                    part = part[: len(part) // 2]
                    self.close_connection = True
                server.sent += len(part)  # before the write, after which the test may go on
                self.wfile.write(part)

            def log_message(self, *_: object) -> None:
                """Log nothing."""

        return Handler


@pytest.fixture
def server() -> Iterator[Server]:
    """A web server that runs on a loopback port."""
    made = Server(dict(FILES))
    http = ThreadingHTTPServer(("127.0.0.1", 0), made.handler())
    made.address = f"http://127.0.0.1:{http.server_address[1]}/models/m"
    thread = threading.Thread(target=http.serve_forever, daemon=True)
    thread.start()
    try:
        yield made
    finally:
        http.shutdown()
        http.server_close()
        thread.join()


def test_all_of_it_once(server: Server, tmp_path: Path) -> None:
    """All files are fetched, and the progress is reported up to the last byte. A second call uses no network."""
    seen: list[tuple[int, int]] = []
    folder = fetch(server.address, tmp_path, PATTERNS, lambda done, total, name: seen.append((done, total)))
    assert {file.name: file.read_bytes() for file in folder.iterdir() if not file.name.startswith(".")} == FILES
    total = sum(map(len, FILES.values()))
    assert seen[-1] == (total, total)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    server.files.clear()
    assert fetch(server.address, tmp_path, PATTERNS) == folder


def test_what_has_come_is_not_fetched_again(server: Server, tmp_path: Path) -> None:
    """A complete shard is kept, and a partial shard is continued after its last byte."""
    server.files["two.safetensors"] = b""
    folder = fetch(server.address, tmp_path, PATTERNS)
    (folder / fetching.COMPLETE).unlink()
    server.files = dict(FILES)
    (folder / "two.safetensors").unlink()
    (folder / "two.safetensors.part").write_bytes(FILES["two.safetensors"][:7000])
    server.asked.clear()
    server.sent = 0
    fetch(server.address, tmp_path, PATTERNS, chunk_bytes=1024)
    assert (folder / "two.safetensors").read_bytes() == FILES["two.safetensors"]
    assert "one.safetensors" not in server.asked
    assert server.sent <= len(SHARD) - 7000 + len(FILES["model.safetensors.index.json"])


def test_a_connection_that_breaks_is_taken_up(server: Server, tmp_path: Path) -> None:
    """A download whose connection breaks is tried up to three times.

    If the last try fails, the error has the number of tries. The next call resumes the download.
    """
    server.breaks = 2
    assert (fetch(server.address, tmp_path / "a", PATTERNS) / "one.safetensors").read_bytes() == SHARD
    server.breaks = 100
    with pytest.raises(FetchError, match=r"one.safetensors broke off 3 times"):
        fetch(server.address, tmp_path / "b", PATTERNS)
    server.breaks = 0
    assert (fetch(server.address, tmp_path / "b", PATTERNS) / "two.safetensors").read_bytes() == SHARD[::-1]


def test_one_process_fetches_and_the_others_wait(server: Server, tmp_path: Path) -> None:
    """Four concurrent fetches of the same model download each file only once in all."""
    with ThreadPoolExecutor(4) as pool:
        folders = list(pool.map(lambda _: fetch(server.address, tmp_path, PATTERNS), range(4)))
    assert len(set(folders)) == 1
    assert server.asked.count("one.safetensors") == 1


def test_a_damaged_folder_is_mended(server: Server, tmp_path: Path) -> None:
    """A file with a wrong size is fetched again."""
    folder = fetch(server.address, tmp_path, PATTERNS)
    (folder / "one.safetensors").write_bytes(b"x")
    assert (fetch(server.address, tmp_path, PATTERNS) / "one.safetensors").read_bytes() == SHARD


def test_what_cannot_be_fetched_says_why(server: Server, tmp_path: Path) -> None:
    """If a fetch fails, the error names the reason: no files, no config.json, or a full disk."""
    with pytest.raises(FetchError, match=r"no config.json"):
        fetch(server.address, tmp_path / "p", ("*.safetensors",))
    with pytest.raises(FetchError, match=r"the disk is full: .* set weights.cache_dir"):
        fetch(server.address, tmp_path / "q", PATTERNS, free=lambda _: 100)
    server.files.clear()
    with pytest.raises(FetchError, match=r"no config.json"):
        fetch(server.address, tmp_path / "r", PATTERNS)


def test_as_a_models_source(server: Server, tmp_path: Path) -> None:
    """The rules for sources also hold for a web address as a model's source."""
    spec = ModelSpec("m", server.address)
    folder = resolve(spec, SourceRules(tmp_path))
    assert (folder / "two.safetensors").read_bytes() == SHARD[::-1]
    with pytest.raises(SourceError, match=r"not among weights.allow.sources"):
        resolve(spec, SourceRules(tmp_path, allowed_sources=("s3://*",)))
    server.files.clear()
    with pytest.raises(SourceError, match=r"models\[n\].source: .*no config.json"):
        resolve(ModelSpec("n", server.address + "/other"), SourceRules(tmp_path))


MODULES: dict[str, bytes] = {
    "config.json": b"{}",
    "model.safetensors": SHARD,
    "modules.json": json.dumps(
        [
            {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
            {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
            {"idx": 2, "name": "2", "path": "2_Dense", "type": "sentence_transformers.models.Dense"},
            {"idx": 3, "name": "3", "path": "3_Normalize", "type": "sentence_transformers.models.Normalize"},
        ]
    ).encode(),
    "1_Pooling/config.json": b'{"pooling_mode_cls_token": true}',
    "2_Dense/config.json": b'{"out_features": 2}',
    "2_Dense/model.safetensors": SHARD,
}
"""An embedding model in sentence-transformers' layout. The module Normalize has no files."""


def test_the_settings_of_an_embedding_model_are_fetched(server: Server, tmp_path: Path) -> None:
    """The files in the module folders of an embedding model are fetched from a web server and from an object store."""
    server.files = dict(MODULES)
    store = fsspec.filesystem("memory")
    for name, content in MODULES.items():
        store.pipe(f"/bucket/m/{name}", content)
    store.pipe("/bucket/m/onnx/model.safetensors", b"not a module's")
    for source in (server.address, "memory://bucket/m"):
        folder = fetch(source, tmp_path, PATTERNS)
        got = {
            file.relative_to(folder).as_posix(): file.read_bytes()
            for file in folder.rglob("*")
            if file.is_file() and not file.name.startswith(".")
        }
        assert got == MODULES


@pytest.mark.parametrize("path", ["../up", "/etc", "a/b", ".git", "x" * 65])
def test_a_module_outside_the_folder_is_refused(server: Server, tmp_path: Path, path: str) -> None:
    """A modules.json with a path that is not a plain folder name is refused, and nothing is written to that path."""
    modules = json.dumps([{"type": "sentence_transformers.models.Pooling", "path": path}]).encode()
    server.files = MODULES | {"modules.json": modules}
    with pytest.raises(FetchError, match=r"modules\.json names the folder"):
        fetch(server.address, tmp_path, PATTERNS)


class Bucket(fsspec.AbstractFileSystem):  # type: ignore[misc]
    """An object store whose file system keeps each listing for ever by default, as those of s3fs and gcsfs do. `files`:
    contents by path."""

    files: dict[str, bytes]

    def ls(self, path: str, detail: bool = True, refresh: bool = False, **_: object) -> list[Any]:
        """Return the files directly below a path. Raises FileNotFoundError."""
        path = self._strip_protocol(path)
        if refresh or path not in self.dircache:
            below = {name: content for name, content in self.files.items() if name.rpartition("/")[0] == path}
            if not below:
                raise FileNotFoundError(path)
            entries = [{"name": name, "size": len(content), "type": "file"} for name, content in below.items()]
            self.dircache[path] = entries
        else:
            entries = self.dircache[path]
        return entries if detail else [entry["name"] for entry in entries]

    def invalidate_cache(self, path: str | None = None) -> None:
        """Forget the listing of a path, or all listings."""
        if path is None:
            self.dircache.clear()
        else:
            self.dircache.pop(self._strip_protocol(path), None)

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **_: object) -> bytes:
        """Return a part of a file. Raises FileNotFoundError."""
        try:
            return self.files[self._strip_protocol(path)][start:end]
        except KeyError:
            raise FileNotFoundError(path) from None


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, bytes]]:
    """The contents, by path, of the object store that serves s3:// addresses."""

    class Store(Bucket):
        protocol = "s3"
        files: dict[str, bytes] = {}  # noqa: RUF012 - all instances have the same files

    monkeypatch.setitem(file_systems, "s3", Store)
    yield Store.files
    Store.clear_instance_cache()


def test_a_model_that_is_uploaded_again_is_listed_again(bucket: dict[str, bytes], tmp_path: Path) -> None:
    """Replaced files of a model in an object store are fetched with their new sizes, also by a process that has listed
    the old ones. The same holds for the folders of an embedding model's modules."""
    source, new_shard, new_settings = "s3://bucket/m", SHARD[1:], b'{"pooling_mode_mean_tokens": true}'
    bucket.update({f"bucket/m/{name}": content for name, content in MODULES.items()})
    fetch(source, tmp_path / "a", PATTERNS)
    bucket["bucket/m/model.safetensors"] = new_shard
    bucket["bucket/m/1_Pooling/config.json"] = new_settings
    folder = fetch(source, tmp_path / "b", PATTERNS)
    assert (folder / "model.safetensors").read_bytes() == new_shard
    assert (folder / "1_Pooling/config.json").read_bytes() == new_settings


def test_a_model_that_is_not_uploaded_yet_can_be_fetched_later(bucket: dict[str, bytes], tmp_path: Path) -> None:
    """A model of which only the weights were in the object store is fetched by the same process once its config.json is
    there."""
    bucket["bucket/m/model.safetensors"] = SHARD
    with pytest.raises(SourceError, match=r"there is no config\.json"):
        resolve(ModelSpec("m", "s3://bucket/m"), SourceRules(tmp_path))
    bucket["bucket/m/config.json"] = b"{}"
    folder = resolve(ModelSpec("m", "s3://bucket/m"), SourceRules(tmp_path))
    assert (folder / "model.safetensors").read_bytes() == SHARD


def test_an_adapter_is_fetched_once_its_upload_is_complete(bucket: dict[str, bytes], tmp_path: Path) -> None:
    """An adapter whose load failed because its weights were not in the object store yet is fetched by the same process
    once they are there, and again after they were replaced by a file of another size."""
    store, spec = AdapterStore(SourceRules(tmp_path), None, 16), AdapterSpec("a", "s3://bucket/a")
    bucket[f"bucket/a/{CONFIG}"] = b"{}"
    with pytest.raises(AdapterError, match=WEIGHTS):
        store.fetch(spec)
    for weights in (SHARD, SHARD[1:]):
        bucket[f"bucket/a/{WEIGHTS}"] = weights
        assert (store.fetch(spec).folder / WEIGHTS).read_bytes() == weights
