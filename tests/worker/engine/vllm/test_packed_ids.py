"""Token ids in packed form are decoded to the list of the same ids."""

from __future__ import annotations

from array import array

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.worker.engine.vllm.packed_ids import packed, takes_packed
from cluster.worker.engine.vllm.private_names import resolve


@given(st.lists(st.one_of(st.integers(0, 70_000), st.integers(0, 2**32 - 1)), max_size=50))
def test_they_decode_to_the_list(ids: list[int]) -> None:
    """Packed ids of any size are decoded to the list of the same ids, alone and inside another value."""
    given_ids = packed(array("I", ids))
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(given_ids), type=list[int]) == ids
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(["a", given_ids, None])) == ["a", ids, None]


@pytest.mark.engine
def test_this_vllm_takes_them() -> None:
    """The installed vLLM's encoder and decoder preserve packed ids. `takes_packed` detects a decoder that does not."""
    names = ("EngineCoreRequest", "MsgpackEncoder", "MsgpackDecoder")
    modules = ("vllm.v1.engine", "vllm.v1.serial_utils", "vllm.v1.serial_utils")
    request, encoder, decoder = (resolve(f"{module}.{name}") for module, name in zip(modules, names, strict=True))
    assert takes_packed(request, encoder, decoder)
    assert not takes_packed(request, encoder, dict)
