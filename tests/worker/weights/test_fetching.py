"""Weights are downloaded over HTTP once per node. A download that broke off is resumed at the same byte."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import threading
import tracemalloc
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import fsspec
import numpy
import pytest
from fsspec.registry import _registry as file_systems
from safetensors.numpy import save

from cluster.api.adapters import AdapterSpec
from cluster.api.types import ModelSpec
from cluster.worker.weights import fetching
from cluster.worker.weights.adapter import CONFIG, WEIGHTS, AdapterError
from cluster.worker.weights.adapter_store import AdapterStore
from cluster.worker.weights.checkpoint import MAX_INDEX_BYTES
from cluster.worker.weights.fetching import fetch
from cluster.worker.weights.sources import SourceError, SourceRules, resolve
from cluster.worker.weights.web import FetchError, Pace

pytestmark = pytest.mark.slow

PATTERNS = ("*.json", "*.safetensors", "README.md")


def shard(name: str, first: int) -> bytes:
    """Return a safetensors file of 10 KB with one tensor."""
    return bytes(save({name: numpy.arange(first, first + 10_000, dtype=numpy.uint8)}))


SHARD, OTHER = shard("a", 0), shard("b", 7)
FILES = {
    "config.json": b"{}",
    "tokenizer.json": b"{}",
    "model.safetensors.index.json": json.dumps(
        {"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}
    ).encode(),
    "one.safetensors": SHARD,
    "two.safetensors": OTHER,
}


@dataclass
class Server:
    """A web server that supports ranges.

    `breaks`: number of downloads of weights that the server will break off. `tags`: whether it sends ETags. `hostile`:
    writes the whole answer to a GET of a file in place of the server.
    """

    files: dict[str, bytes]
    breaks: int = 0
    tags: bool = True
    ranges: bool = True
    hostile: dict[str, Callable[[BaseHTTPRequestHandler], None]] = field(default_factory=dict)
    on_get: Callable[[str], None] = lambda _: None
    redirects: dict[str, tuple[int, str]] = field(default_factory=dict)
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
                if name in server.redirects:
                    code, location = server.redirects[name]
                    self.send_response(code)
                    self.send_header("Location", location)
                    self.send_header("Content-Length", "0")
                    self.end_headers()
                    return
                if body:
                    server.asked.append(name)
                    server.on_get(name)
                    content = server.files[name]
                    if name in server.hostile:
                        self.close_connection = True
                        with contextlib.suppress(OSError):
                            server.hostile[name](self)
                        return
                ranged = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
                ranged = ranged if server.ranges else None
                start, end = (int(ranged[1]), int(ranged[2]) + 1) if ranged else (0, len(content))
                part = content[start:end]
                self.send_response(206 if ranged else 200)
                self.send_header("Content-Length", str(len(part)))
                if server.tags:
                    self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
                if ranged:
                    self.send_header("Content-Range", f"bytes {start}-{start + len(part) - 1}/{len(content)}")
                self.end_headers()
                if not body:
                    return
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
    with running(Server(dict(FILES))) as made:
        yield made


@contextlib.contextmanager
def running(made: Server) -> Iterator[Server]:
    """Serve on a loopback port while the context is open."""
    http = ThreadingHTTPServer(("127.0.0.1", 0), made.handler())
    made.address = f"http://127.0.0.1:{http.server_address[1]}/models/m"
    thread = threading.Thread(target=http.serve_forever, args=(0.02,), daemon=True)
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

    def break_two(name: str) -> None:
        server.breaks = 3 if name == "two.safetensors" else 0

    server.on_get = break_two
    with pytest.raises(FetchError, match=r"two.safetensors broke off 3 times"):
        fetch(server.address, tmp_path, PATTERNS)
    server.on_get, server.breaks, server.sent = lambda _: None, 0, 0
    server.asked.clear()
    folder = fetch(server.address, tmp_path, PATTERNS)
    assert (folder / "two.safetensors").read_bytes() == OTHER
    assert "one.safetensors" not in server.asked
    assert server.sent <= len(OTHER) // 4 + 3 * len(FILES["model.safetensors.index.json"])


@pytest.mark.parametrize("version", ["replaced", "not reported"])
@pytest.mark.parametrize("ranges", [True, False])
def test_a_part_of_another_version_is_not_continued(server: Server, tmp_path: Path, version: str, ranges: bool) -> None:
    """A broken download is fetched from its beginning if the file was replaced by one of the same size, if the server
    reports no version, or if it ignores ranges. Complete files of another version are fetched again, too."""

    def break_two(name: str) -> None:
        server.breaks = 3 if name == "two.safetensors" else 0

    server.tags, server.ranges = version == "replaced", ranges
    server.on_get = break_two
    with pytest.raises(FetchError, match=r"two.safetensors broke off 3 times"):
        fetch(server.address, tmp_path, PATTERNS)
    server.on_get, server.breaks = lambda _: None, 0
    new = {"one.safetensors": shard("a", 3), "two.safetensors": shard("b", 4)}
    server.files |= new
    folder = fetch(server.address, tmp_path, PATTERNS)
    assert {name: (folder / name).read_bytes() for name in new} == new


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
    assert (fetch(server.address, tmp_path / "b", PATTERNS) / "two.safetensors").read_bytes() == OTHER


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
    assert (folder / "two.safetensors").read_bytes() == OTHER
    with pytest.raises(SourceError, match=r"not among weights.allow.sources"):
        resolve(spec, SourceRules(tmp_path, allowed_sources=("s3://*",)))
    server.files.clear()
    with pytest.raises(SourceError, match=r"models\[n\].source: .*no config.json"):
        resolve(ModelSpec("n", server.address + "/other"), SourceRules(tmp_path))


MODULES: dict[str, bytes] = {
    "config.json": b"{}",
    "tokenizer.json": b"{}",
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
    ignores_ranges = False

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
            return self.files[self._strip_protocol(path)][slice(None) if self.ignores_ranges else slice(start, end)]
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
    source, new_shard, new_settings = "s3://bucket/m", OTHER, b'{"pooling_mode_mean_tokens": true}'
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
    bucket |= {"bucket/m/model.safetensors": SHARD, "bucket/m/tokenizer.json": b"{}"}
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


@pytest.mark.parametrize("kind", ["web", "store"])
@pytest.mark.parametrize(
    ("lacking", "says"),
    [
        ("two.safetensors", r"index\.json names two\.safetensors, not there"),
        ("tokenizer.json", "has no tokenizer"),
        ("cut", r"one\.safetensors is cut off"),
        ("index", "lacks model-00002-of-00002.safetensors|no weights"),
    ],
)
def test_a_half_uploaded_model_is_fetched_again_when_it_is_whole(
    server: Server, bucket: dict[str, bytes], tmp_path: Path, kind: str, lacking: str, says: str
) -> None:
    """A model whose shards, index or tokenizer are not all uploaded, or whose shard is still growing, is refused by
    name, and fetched by the same node once it is whole."""
    half = {name: content for name, content in FILES.items() if name != lacking}
    if lacking == "cut":
        half["one.safetensors"] = SHARD[:-1]
    if lacking == "index":
        half = {"config.json": b"{}", "tokenizer.json": b"{}", "model-00001-of-00002.safetensors": SHARD}
    source = server.address if kind == "web" else "s3://bucket/half"

    def upload(files: dict[str, bytes]) -> None:
        server.files = files
        bucket.clear()
        bucket.update({f"bucket/half/{name}": content for name, content in files.items()})

    for content in (half, half, FILES):
        upload(dict(content))
        spec = ModelSpec("m", source)
        if content is half:
            with pytest.raises(SourceError, match=rf"models\[m\].source: .*{says}"):
                resolve(spec, SourceRules(tmp_path))
        else:
            folder = resolve(spec, SourceRules(tmp_path))
            assert {name: (folder / name).read_bytes() for name in FILES} == FILES
            assert not list(folder.glob("model-*"))


def test_a_folder_recorded_as_complete_by_mistake_is_fetched_again(server: Server, tmp_path: Path) -> None:
    """A folder that an earlier version recorded as complete without all shards is completed."""
    folder = resolve(ModelSpec("m", server.address), SourceRules(tmp_path))
    (folder / "two.safetensors").unlink()
    record = json.loads((folder / fetching.COMPLETE).read_text())
    del record["sizes"]["two.safetensors"]
    (folder / fetching.COMPLETE).write_text(json.dumps(record))
    resolve(ModelSpec("m", server.address), SourceRules(tmp_path))
    assert (folder / "two.safetensors").read_bytes() == OTHER


def test_a_file_that_changes_during_the_fetch_is_refused(server: Server, tmp_path: Path) -> None:
    """If a file is replaced between the listing and the end of the fetch, the folder is not complete. The next call
    fetches the new file."""

    def replace(name: str) -> None:
        if name == "two.safetensors":
            server.files["one.safetensors"] = shard("a", 3)

    server.on_get = replace
    with pytest.raises(FetchError, match="changed while they were fetched"):
        fetch(server.address, tmp_path, PATTERNS)
    assert (fetch(server.address, tmp_path, PATTERNS) / "one.safetensors").read_bytes() == shard("a", 3)
    server.on_get = lambda name: server.files.update({name: shard("b", 9)}) if name == "two.safetensors" else None
    server.files["two.safetensors"] = shard("b", 8)
    with pytest.raises(FetchError, match=r"two\.safetensors has changed since it was listed"):
        fetch(server.address, tmp_path / "b", PATTERNS)


def endless(handler: BaseHTTPRequestHandler, status: int = 200, head: str = "") -> None:
    """Send a body without end, in spite of the size that was reported."""
    handler.wfile.write(f"HTTP/1.1 {status} OK\r\n{head}Transfer-Encoding: chunked\r\n\r\n".encode())
    piece = b"%x\r\n%s\r\n" % (1 << 20, bytes(1 << 20))
    for _ in range(4096):
        handler.wfile.write(piece)


def dripping(handler: BaseHTTPRequestHandler) -> None:
    """Send a byte each 20 ms."""
    handler.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 10072\r\n\r\n")
    for _ in range(10072):
        handler.wfile.write(b"x")
        threading.Event().wait(0.02)


def dripping_head(handler: BaseHTTPRequestHandler) -> None:
    """Send a header a byte each 20 ms."""
    handler.wfile.write(b"HTTP/1.1 200 OK\r\nX-Name: ")
    for _ in range(10072):
        handler.wfile.write(b"x")
        threading.Event().wait(0.02)


def wrong_range(handler: BaseHTTPRequestHandler) -> None:
    """Answer with the beginning of the file as another range."""
    handler.wfile.write(
        b"HTTP/1.1 206 OK\r\nContent-Range: bytes 0-99/10072\r\nContent-Length: 100\r\n\r\n" + SHARD[:100]
    )


QUICK = Pace(window_s=0.3, least_bytes=1000, head_s=0.5)


@pytest.mark.parametrize(
    ("name", "answer", "says"),
    [
        ("one.safetensors", endless, r"one\.safetensors"),
        ("model.safetensors.index.json", endless, r"model\.safetensors\.index\.json has more than \d+ bytes"),
        ("one.safetensors", dripping, r"one\.safetensors: the server sent \d+ bytes in 0.3 s, at least 1000"),
        ("one.safetensors", dripping_head, r"one\.safetensors: the server does not answer within 0.5 s"),
        ("one.safetensors", wrong_range, r"one\.safetensors: the server sends another range"),
    ],
)
def test_a_hostile_body_ends_the_fetch(
    server: Server, tmp_path: Path, name: str, answer: Callable[[BaseHTTPRequestHandler], None], says: str
) -> None:
    """A body without end, a transfer without progress and a wrong range end the fetch with the file's name, and little
    memory is used for it."""
    server.tags = False
    server.hostile[name] = answer
    tracemalloc.start()
    try:
        with pytest.raises(FetchError, match=says):
            fetch(server.address, tmp_path, PATTERNS, pace=QUICK)
        assert tracemalloc.get_traced_memory()[1] < 3 * MAX_INDEX_BYTES
    finally:
        tracemalloc.stop()


def test_an_endless_file_of_an_adapter_is_cut_at_its_size(server: Server, tmp_path: Path) -> None:
    """An adapter's file is read up to the reported size, and then refused."""
    server.files = {CONFIG: b"{}", WEIGHTS: SHARD}
    server.tags = False
    server.hostile[WEIGHTS] = endless
    with pytest.raises(AdapterError, match=rf"adapters\[a\].source: {WEIGHTS}"):
        AdapterStore(SourceRules(tmp_path), None, 16).fetch(AdapterSpec("a", server.address))


@pytest.mark.parametrize("code", [302, 308])
def test_redirects_are_followed_only_where_sources_are_allowed(server: Server, tmp_path: Path, code: int) -> None:
    """A redirect within the server is followed. One to another server is refused unless a pattern allows the address;
    the other server gets no request."""
    with running(Server(dict(FILES))) as other:

        def to(location: str) -> None:
            server.redirects = {"one.safetensors": (code, location)}

        to("/models/m/two.safetensors")
        server.files["two.safetensors"] = SHARD
        assert (fetch(server.address, tmp_path / "a", PATTERNS) / "one.safetensors").read_bytes() == SHARD
        for number, allowed in enumerate([("*",), (server.address + "*",), ("*", other.address + "/one*")]):
            to(f"{other.address}/one.safetensors")
            root = tmp_path / str(number)
            if number < 2:
                with pytest.raises(FetchError, match=r"one\.safetensors: redirected to .* weights\.allow\.sources"):
                    fetch(server.address, root, PATTERNS, allowed_sources=allowed)
                assert not other.asked
            else:
                fetch(server.address, root, PATTERNS, allowed_sources=allowed)
                assert other.asked == ["one.safetensors"]
        for location in ("file:///etc/passwd", "ftp://x/y", "//", "http://[", ""):
            to(location)
            with pytest.raises(FetchError, match=r"one\.safetensors: "):
                fetch(server.address, tmp_path / "z", PATTERNS)
    to("/models/m/one.safetensors")
    with pytest.raises(FetchError, match=r"one\.safetensors: more than 5 redirects"):
        fetch(server.address, tmp_path / "y", PATTERNS)


def test_an_object_store_that_ignores_ranges_is_refused(bucket: dict[str, bytes], tmp_path: Path) -> None:
    """An object store that answers a range with more bytes is refused, and nothing is put together from its answers."""
    bucket |= {f"bucket/m/{name}": content for name, content in FILES.items()}
    Bucket.ignores_ranges = True
    try:
        with pytest.raises(FetchError, match="the store ignores the range"):
            fetch("s3://bucket/m", tmp_path, PATTERNS, chunk_bytes=1024)
    finally:
        Bucket.ignores_ranges = False
