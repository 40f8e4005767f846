"""NaN in weights of any type is found while the digest is computed, and finite numbers always pass."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from cluster.worker.weights.digests import PIECE_BYTES, weight_digest
from cluster.worker.weights.finite import spans

TYPES = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float8_e5m2,
    torch.float8_e4m3fn,
    torch.int32,
    torch.uint8,
]
FLOATS = TYPES[:6]


def write(folder: Path, tensors: dict[str, Any]) -> Path:
    """Write a folder with one weight file; return the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors")
    return folder


def patterns(kind: torch.dtype) -> torch.Tensor:
    """Return every number of a type with up to 16 bits, or many numbers of a larger type."""
    width = torch.empty(0, dtype=kind).element_size()
    if width == 1:
        return torch.arange(256, dtype=torch.int32).to(torch.uint8).view(kind)
    if width == 2:
        return torch.arange(1 << 16, dtype=torch.int32).to(torch.uint16).view(kind)
    bits = {4: torch.int32, 8: torch.int64}[width]
    high = torch.arange(1 << 16, dtype=torch.int64) << (8 * width - 16)
    return torch.cat([high, high + 1, high - 1]).to(bits).view(kind)


def refused(folder: Path, tensors: dict[str, Any], piece_bytes: int = PIECE_BYTES) -> str:
    """Return the reason why a folder with these tensors is refused, or an empty text if it is accepted."""
    try:
        weight_digest(write(folder, tensors), folder / "cache", piece_bytes=piece_bytes)
    except ValueError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("kind", FLOATS, ids=str)
def test_each_number_of_a_type_is_judged_rightly(tmp_path: Path, kind: torch.dtype) -> None:
    """All finite numbers are accepted. NaN is refused in a matrix and in a vector. Infinity is refused in a matrix and
    allowed in a vector."""
    numbers = patterns(kind)
    wide = numbers.to(torch.float64)
    finite = numbers[torch.isfinite(wide)]
    assert not refused(tmp_path / "finite", {"a.weight": finite[None], "b.bias": finite.clone()})
    for value in (float("nan"), float("inf"), -float("inf")):
        odd = numbers[torch.isnan(wide) if value != value else wide == value]
        if not len(odd):
            continue
        signs = {*odd[:1], *odd[-1:]}
        for number in signs:
            spoilt = finite.clone()
            spoilt[len(finite) // 2] = number
            is_nan = value != value
            why = refused(tmp_path / "matrix", {"a.weight": spoilt[None].contiguous()})
            assert ("NaN" if is_nan else "infinite numbers") + " in a.weight" in why
            assert bool(refused(tmp_path / "vector", {"a.bias": spoilt})) == is_nan


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.sampled_from(TYPES), st.integers(0, 40)), min_size=1, max_size=6), st.data())
def test_a_nan_anywhere_is_found_and_the_digest_is_of_all_bytes(
    tmp_path: Path, kinds: list[tuple[torch.dtype, int]], data: st.DataObject
) -> None:
    """NaN is found at any position of any tensor, and the digest is the SHA-256 of all bytes."""
    tensors = {f"t{at}.weight": torch.ones(size).to(kind) for at, (kind, size) in enumerate(kinds)}
    folder = write(tmp_path / "m", tensors)
    file = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    total = hashlib.sha256(f"model.safetensors\0{file}\n".encode()).hexdigest()
    assert weight_digest(folder, tmp_path / str(data.draw(st.uuids())), piece_bytes=64) == f"sha256:{total}"
    floats = [name for name, tensor in tensors.items() if tensor.is_floating_point() and len(tensor)]
    if not floats:
        return
    name = data.draw(st.sampled_from(floats))
    tensors[name][data.draw(st.integers(0, len(tensors[name]) - 1))] = float("nan")
    assert f"model.safetensors: NaN in {name}" in refused(tmp_path / "m", tensors, 64)


def test_a_record_of_a_digest_without_the_check_is_made_again(tmp_path: Path) -> None:
    """The stored digest of an earlier release, which did not check for NaN, is not used."""
    folder, cache = write(tmp_path / "m", {"a.weight": torch.ones(2, 2)}), tmp_path / "cache"
    digest = weight_digest(folder, cache)
    (record,) = (cache / "digests").iterdir()
    kept = json.loads(record.read_text())
    record.write_text(json.dumps(kept | {"digest": "sha256:00"}))
    assert weight_digest(folder, cache) == "sha256:00", "else the record is believed"
    record.write_text(json.dumps({name: value for name, value in kept.items() if name != "finite"}))
    assert weight_digest(folder, cache) == digest


@pytest.mark.parametrize("content", [b"", b"1234", b"\xff" * 20, b"\2\0\0\0\0\0\0\0[]", b"\2\0\0\0\0\0\0\0{}"])
def test_a_damaged_file_has_no_spans(tmp_path: Path, content: bytes) -> None:
    """A damaged file is hashed without a check for NaN."""
    file = tmp_path / "model.safetensors"
    file.write_bytes(content)
    assert spans(file) == []
    assert weight_digest(tmp_path, tmp_path / "cache").startswith("sha256:")
