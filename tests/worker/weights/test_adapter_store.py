"""The store of adapters on a node's disk: sources, digests, permissions, links, and refused adapters."""

from __future__ import annotations

import dataclasses
import os
import stat
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from cluster.api.adapters import AdapterSpec
from cluster.worker.weights.adapter import CONFIG, WEIGHTS, AdapterError, adapter_digest
from cluster.worker.weights.adapter_store import ABANDONED_S, AdapterStore
from cluster.worker.weights.model_card import MAX_CARD_BYTES
from cluster.worker.weights.sources import SourceError, SourceRules
from tests.support.adapters import write_adapter
from tests.support.hub import running_hub
from tests.worker.weights.test_adapter import write_base


@pytest.fixture
def store(tmp_path: Path) -> AdapterStore:
    """A store for a base model of hidden size 32."""
    return AdapterStore(SourceRules(tmp_path / "cache"), write_base(tmp_path / "base", 32), 16)


@pytest.fixture
def folder(tmp_path: Path, store: AdapterStore) -> Path:
    """The folder of a good adapter."""
    assert store.base is not None
    assert store.base is not None
    return write_adapter(tmp_path / "source", store.base)


def left(store: AdapterStore) -> list[str]:
    """Return the names of the entries in the store's folder."""
    return sorted(file.name for file in store.root.iterdir())


def test_an_adapter_lies_private_under_its_digest(store: AdapterStore, folder: Path) -> None:
    """The folder of a stored adapter is named by the adapter's digest and holds only the adapter's files. Only the
    owner of the folder can read it."""
    (folder / "training_args.bin").write_bytes(b"x")
    stored = store.fetch(AdapterSpec("a", str(folder)))
    assert stored.digest == adapter_digest(folder)
    assert stored.folder == store.root / stored.digest
    assert left(store) == [stored.digest]
    assert sorted(file.name for file in stored.folder.iterdir()) == ["adapter_config.json", WEIGHTS]
    for path in (store.root, stored.folder, *stored.folder.iterdir()):
        assert not stat.S_IMODE(path.stat().st_mode) & 0o077


def test_a_stored_adapter_needs_no_source(store: AdapterStore, folder: Path) -> None:
    """An adapter whose digest is known is used from the store, even if its source no longer exists."""
    stored = store.fetch(AdapterSpec("a", str(folder)))
    (folder / WEIGHTS).unlink()
    assert store.fetch(AdapterSpec("b", str(folder), stored.digest)) == stored


def test_changed_files_in_the_store_are_fetched_again(store: AdapterStore, folder: Path) -> None:
    stored = store.fetch(AdapterSpec("a", str(folder)))
    with (stored.folder / WEIGHTS).open("r+b") as file:
        file.seek(-3, os.SEEK_END)
        file.write(b"\xff\xff\xff")
    assert store.fetch(AdapterSpec("a", str(folder), stored.digest)) == stored
    assert adapter_digest(stored.folder) == stored.digest


def test_another_digest_is_refused(store: AdapterStore, folder: Path) -> None:
    with pytest.raises(AdapterError, match=rf"adapters\[a\]\.digest: the files have {adapter_digest(folder)}"):
        store.fetch(AdapterSpec("a", str(folder), "0" * 64))
    assert left(store) == []


def test_a_damaged_adapter_leaves_nothing(store: AdapterStore, folder: Path) -> None:
    """A damaged adapter is refused, and nothing stays in the store. The error names the adapter, not its copy."""
    os.truncate(folder / WEIGHTS, 100)
    with pytest.raises(AdapterError, match=rf"adapters\[a\]/{WEIGHTS} has 100 bytes"):
        store.fetch(AdapterSpec("a", str(folder)))
    assert left(store) == []


def test_a_link_to_another_file_is_not_followed(store: AdapterStore, folder: Path, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    (folder / WEIGHTS).rename(secret)
    (folder / WEIGHTS).symlink_to(secret)
    with pytest.raises(AdapterError, match="is a link"):
        store.fetch(AdapterSpec("a", str(folder)))


def test_links_within_the_hubs_cache_are_followed(store: AdapterStore, folder: Path) -> None:
    """In the hub's cache a snapshot consists of links to files beside it. These links are followed, and the files are
    copied."""
    hub = store.rules.cache_dir / "hub" / "models--o--n"
    snapshot, blobs = hub / "snapshots" / "main", hub / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for file in folder.iterdir():
        file.rename(blobs / file.name)
        (snapshot / file.name).symlink_to(f"../../blobs/{file.name}")
    stored = store.fetch(AdapterSpec("a", str(snapshot)))
    assert not any(file.is_symlink() for file in stored.folder.iterdir())


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("nowhere", "there is no folder"),
        ("gopher://x", "is unknown"),
        ("hf://one-part", "expected hf://organisation/name"),
        ("", "there is no|adapter_config"),
    ],
)
def test_a_wrong_source_is_named(store: AdapterStore, source: str, says: str) -> None:
    with pytest.raises((AdapterError, SourceError), match=says):
        store.fetch(AdapterSpec("a", source))


def test_sources_and_licenses_follow_the_rules(store: AdapterStore, folder: Path) -> None:
    only = AdapterStore(dataclasses.replace(store.rules, allowed_sources=("hf://org/*",)), store.base, 16)
    with pytest.raises(AdapterError, match=r"weights\.allow\.sources"):
        only.fetch(AdapterSpec("a", str(folder)))
    inside = AdapterStore(dataclasses.replace(store.rules, allowed_sources=(f"{store.base}/*",)), store.base, 16)
    with pytest.raises(AdapterError, match=r"weights\.allow\.sources"):
        inside.fetch(AdapterSpec("a", f"{store.base}/../{folder.name}"))
    licensed = AdapterStore(dataclasses.replace(store.rules, allowed_licenses=("mit",)), store.base, 16)
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    with pytest.raises(AdapterError, match=r"adapters\[a\]\.license"):
        licensed.fetch(AdapterSpec("a", str(folder)))
    (folder / "README.md").write_text("---\nlicense: mit\n---\n")
    digest = licensed.fetch(AdapterSpec("a", str(folder))).digest
    assert licensed.fetch(AdapterSpec("a", str(folder), digest)).digest == digest, "the card is kept"


@pytest.mark.parametrize("size", [0, MAX_CARD_BYTES + 1])
def test_without_a_licence_rule_no_card_is_needed(store: AdapterStore, folder: Path, size: int) -> None:
    """A card that cannot be copied is left out if all licences are allowed, and is an error if a rule needs it."""
    card = folder / "README.md"
    if size:
        card.write_bytes(b"x" * size)
    else:
        (folder / "card").write_text("---\nlicense: mit\n---\n")
        card.symlink_to("card")
    assert not (store.fetch(AdapterSpec("a", str(folder))).folder / card.name).exists()
    licensed = AdapterStore(dataclasses.replace(store.rules, allowed_licenses=("mit",)), store.base, 16)
    with pytest.raises(AdapterError, match=r"README\.md"):
        licensed.fetch(AdapterSpec("a", str(folder)))


def test_what_an_engine_failed_on_is_not_tried_again(store: AdapterStore, folder: Path) -> None:
    """An adapter that an engine failed to load is refused. Otherwise the replica's successor would fail in the same
    way."""
    stored = store.fetch(AdapterSpec("a", str(folder)))
    store.mark_corrupting(stored.digest, "rank 1 could not read it")
    for digest in ("", stored.digest):
        with pytest.raises(AdapterError, match=r"rank 1 could not read it.*remove .*refused"):
            store.fetch(AdapterSpec("a", str(folder), digest))
    (store.root / f"{stored.digest}.refused").unlink()
    assert store.fetch(AdapterSpec("a", str(folder))) == stored


def test_unfinished_fetches_are_removed_after_a_day(store: AdapterStore, folder: Path) -> None:
    for name, age_s in ((".part-old", ABANDONED_S + 60), (".part-new", 0.0)):
        (store.root / name).mkdir(parents=True)
        os.utime(store.root / name, (time.time() - age_s,) * 2)
    stored = store.fetch(AdapterSpec("a", str(folder)))
    assert left(store) == [".part-new", stored.digest]


def test_the_same_adapter_is_fetched_at_once_by_several(store: AdapterStore, folder: Path) -> None:
    """Replicas that start together on a node share the store, and none of them sees unfinished files of another."""
    found, errors = [], []

    def fetch() -> None:
        try:
            found.append(AdapterStore(store.rules, store.base, 16).fetch(AdapterSpec("a", str(folder))))
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=fetch) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert len(set(found)) == 1
    assert left(store) == [found[0].digest]


@pytest.fixture
def server(folder: Path) -> Iterator[str]:
    """A web server with the adapter's files; yields its address."""

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder))) as running:
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{running.server_address[1]}"
        finally:
            running.shutdown()
            thread.join()


def test_an_adapter_comes_from_a_web_server(store: AdapterStore, folder: Path, server: str) -> None:
    pytest.importorskip("fsspec")
    pytest.importorskip("aiohttp")
    parts: list[str] = []
    stored = store.fetch(AdapterSpec("a", server), lambda: parts.append("part"))
    assert stored.digest == adapter_digest(folder)
    assert len(parts) > len(list(folder.iterdir())), "each file reports progress, when it is fetched and copied"
    assert left(store) == [stored.digest]
    with pytest.raises(AdapterError, match=r"^adapters\[a\]\.source: there is no"):
        store.fetch(AdapterSpec("a", f"{server}/elsewhere"))


def test_a_simulated_engine_reads_no_weights(tmp_path: Path, folder: Path) -> None:
    """Without a base model, as for a simulated engine, only the adapter's digest is computed."""
    sim = AdapterStore(SourceRules(tmp_path / "sim"), None, 16)
    (folder / WEIGHTS).write_bytes(b"not a tensor")
    assert sim.fetch(AdapterSpec("a", str(folder))).digest == adapter_digest(folder)


def test_a_giant_file_is_not_fetched(store: AdapterStore, folder: Path, server: str) -> None:
    """A file that is too large for any adapter of the model is refused by its size, before any file is fetched."""
    pytest.importorskip("fsspec")
    pytest.importorskip("aiohttp")
    os.truncate(folder / WEIGHTS, 1 << 40)  # a hole
    with pytest.raises(AdapterError, match=rf"{WEIGHTS} has {1 << 40} bytes, at most [0-9]+ are allowed"):
        store.fetch(AdapterSpec("a", server))
    assert left(store) == []


def test_a_giant_file_of_the_hub_is_not_fetched(
    store: AdapterStore, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If a file of an adapter on the hub is too large for any adapter of the model, none of the adapter's files is
    fetched. An adapter with files of normal size is fetched."""
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)  # the variable as it was at the import
    spec = AdapterSpec("a", "hf://o/n")
    with running_hub("o/n", folder, {WEIGHTS: 1 << 40}) as hub:
        from_hub = replace(store, rules=replace(store.rules, hub_endpoint=hub.url))
        with pytest.raises(SourceError, match=rf"{WEIGHTS} has {1 << 40} bytes, at most [0-9]+ are allowed"):
            from_hub.fetch(spec)
        assert not hub.fetched
    assert left(store) == []
    with running_hub("o/n", folder) as hub:
        from_hub = replace(store, rules=replace(store.rules, hub_endpoint=hub.url))
        assert from_hub.fetch(spec).digest == adapter_digest(folder)
        assert set(hub.fetched) >= {CONFIG, WEIGHTS}
