"""The decoder, which remembers decoded blocks, returns the same fields as hpack's own decoder."""

from __future__ import annotations

import pytest
from hpack import Decoder, Encoder, HPACKError, NeverIndexedHeaderTuple
from hypothesis import given
from hypothesis import strategies as st

from cluster.http2.header_decoder import MAX_BLOCK_BYTES, MAX_BLOCKS, MAX_FIELDS, HeaderDecoder

fields = st.tuples(st.sampled_from([b":path", b"te", b"x-a", b"x-b"]), st.sampled_from([b"", b"1", b"two", b"x" * 40]))
headers = st.lists(st.one_of(fields, fields.map(lambda field: NeverIndexedHeaderTuple(*field))), min_size=1, max_size=5)
sizes = st.sampled_from([None, None, None, 0, 80, 4096])


@given(st.lists(st.tuples(headers, sizes, st.integers(1, 3)), max_size=30))
def test_repeated_blocks_give_the_fields_of_hpack(
    sent: list[tuple[list[tuple[bytes, bytes]], int | None, int]],
) -> None:
    """The decoder and hpack's own decoder agree on every header block: a new block, a repeated block, and a block
    repeated after the header table has changed."""
    encoder, plain, remembering = Encoder(), Decoder(), HeaderDecoder()
    for given_headers, size, times in sent:
        if size is not None:
            encoder.header_table_size = size
        block = encoder.encode(given_headers, huffman=False)
        for _ in range(times):  # a block that changes the table may mean something else when it is sent again
            try:
                expected = list(plain.decode(block, raw=True))
            except HPACKError as error:
                with pytest.raises(type(error)):
                    remembering.decode(block, raw=True)
                return
            assert list(remembering.decode(block, raw=True)) == expected
        encoder.header_table.dynamic_entries.clear()
        encoder.header_table.dynamic_entries.extend(plain.header_table.dynamic_entries)
        encoder.header_table._current_size = plain.header_table._current_size


def test_the_memory_is_bounded() -> None:
    """The decoder remembers the fields of at most MAX_BLOCKS header blocks. It remembers no block that is long or has
    many fields."""
    encoder, decoder = Encoder(), HeaderDecoder()
    for number in range(3 * MAX_BLOCKS):
        decoder.decode(encoder.encode([NeverIndexedHeaderTuple(b"x-number", b"%d" % number)]), raw=True)
        assert len(decoder._known) <= MAX_BLOCKS
    kept = len(decoder._known)
    assert kept > 0
    decoder.decode(encoder.encode([NeverIndexedHeaderTuple(b"x", b"\xff" * MAX_BLOCK_BYTES)]), raw=True)
    decoder.decode(encoder.encode([(b":method", b"GET")] * (MAX_FIELDS + 1)), raw=True)
    assert len(decoder._known) == kept


def test_a_repeated_block_is_not_decoded_again() -> None:
    """Decoding the same bytes again returns the same list object, until an entry is added to the header table."""
    encoder, decoder = Encoder(), HeaderDecoder()
    block = encoder.encode([(b":method", b"POST"), NeverIndexedHeaderTuple(b"x-key", b"secret")])
    first = decoder.decode(block, raw=True)
    assert decoder.decode(block, raw=True) is first
    decoder.decode(encoder.encode([(b"x-new", b"entry")]), raw=True)
    again = decoder.decode(block, raw=True)
    assert again is not first
    assert list(again) == list(first)
