"""A bundle holds the files that the gateway needs and is the same after every transfer. It cannot be built from a
folder without a usable tokenizer."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.wire.bundle import Bundle
from cluster.worker.weights.tokenizer_bundle import build_bundle
from tests.gateway.text.kinds import Kind

NAMES = st.text(st.characters(codec="utf-8", exclude_characters="/\x00"), min_size=1, max_size=20).filter(
    lambda name: not name.startswith(".")
)
BUNDLES = st.dictionaries(NAMES, st.binary(max_size=200), max_size=6).map(Bundle)


@given(bundle=BUNDLES)
def test_pack_and_unpack(bundle: Bundle) -> None:
    """A bundle that is packed and unpacked again has the same files and the same digest."""
    again = Bundle.unpack(bundle.pack())
    assert again.files == bundle.files
    assert again.digest == bundle.digest


@given(bundle=BUNDLES, other=BUNDLES)
def test_digests_tell_contents_apart(bundle: Bundle, other: Bundle) -> None:
    """Two bundles have the same digest if they have the same contents, and only then."""
    assert (bundle.digest == other.digest) == (bundle.files == other.files)


@given(bundle=BUNDLES, data=st.data())
def test_a_cut_bundle_is_refused(bundle: Bundle, data: st.DataObject) -> None:
    """The truncated bytes of a bundle are refused, or yield some of the files unchanged. They never yield a changed
    file."""
    packed = bundle.pack()
    cut = packed[: data.draw(st.integers(0, max(len(packed) - 1, 0)))]
    try:
        again = Bundle.unpack(cut)
    except ValueError:
        return
    assert again.files.items() <= bundle.files.items()


@settings(max_examples=20, deadline=None)
@given(files=st.dictionaries(st.sampled_from("abcdef"), st.binary(max_size=50), max_size=4))
def test_save_and_load(tmp_path_factory: pytest.TempPathFactory, files: dict[str, bytes]) -> None:
    """A saved bundle can be loaded, and saving another bundle into the existing folder changes nothing."""
    folder = tmp_path_factory.mktemp("bundles") / "one"
    Bundle(files).save(folder)
    Bundle({"other": b"x"}).save(folder)
    assert Bundle.load(folder).files == files


def test_equal_folders_have_equal_digests(kind: Kind) -> None:
    """Two bundles that are built from the same folder have the same digest. They hold text files only."""
    bundle = build_bundle(kind.folder)
    assert bundle.digest == build_bundle(kind.folder).digest
    assert sorted(bundle.files) == [
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert json.loads(bundle.files["config.json"])["vocab_size"] == len(kind.theirs)


def test_generation_defaults_are_kept(kinds: dict[str, Kind]) -> None:
    """A bundle holds the whole generation_config.json, since the sampling defaults of the model are in that file."""
    generation = json.loads(build_bundle(kinds["llama"].folder).files["generation_config.json"])
    assert (generation["temperature"], generation["top_p"]) == (0.6, 0.9)
    assert len(generation["eos_token_id"]) == 2


def test_a_folder_without_tokenizer_is_refused(tmp_path: Path) -> None:
    """Building a bundle from a folder without tokenizer files raises an error that names tokenizer.json."""
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ValueError, match=r"tokenizer\.json"):
        build_bundle(tmp_path)


def test_a_slow_tokenizer_is_refused(tmp_path: Path) -> None:
    """Building a bundle from a tokenizer that exists only in Python raises an error that says so."""
    (tmp_path / "config.json").write_text('{"model_type": "ctrl"}')
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "CTRLTokenizer"}')
    (tmp_path / "vocab.json").write_text('{"<unk>": 0, "a</w>": 1}')
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    with pytest.raises(ValueError, match="no fast form"):
        build_bundle(tmp_path)
