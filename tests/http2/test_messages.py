"""gRPC's message framing, compression, timeouts and metadata are encoded and decoded correctly."""

from __future__ import annotations

import gzip
import zlib

import pytest
from hpack import Decoder
from hyperframe.frame import ContinuationFrame, Frame, HeadersFrame
from hypothesis import given
from hypothesis import strategies as st

from cluster.http2.frames import NO_TABLE, block, header_frames
from cluster.http2.messages import (
    INFLATE_BYTES,
    Assembler,
    BadMessage,
    Inflater,
    RequestHead,
    headers_of,
    metadata_of,
    status_message,
    timeout_s,
)

messages = st.lists(st.binary(max_size=300), max_size=8)


def framed(message: bytes, flag: int = 0) -> bytes:
    """Return a message with the prefix that it has on the wire: the flag and the length."""
    return bytes([flag]) + len(message).to_bytes(4, "big") + message


@given(messages, st.data())
def test_messages_come_out_however_they_are_cut(sent: list[bytes], data: st.DataObject) -> None:
    """The assembler returns the same messages however the bytes are split, and buffers exactly the bytes after the last
    message."""
    wire = b"".join(map(framed, sent))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(wire)), max_size=10)))
    assembler, got, size = Assembler(1000), [], 0
    for begin, end in zip([0, *cuts], [*cuts, len(wire)], strict=True):
        for message, on_wire, compressed in assembler.add(wire[begin:end]):
            assert not compressed
            got.append(message)
            size += on_wire
        assert size + assembler.held_bytes == end
    assert got == sent


def received(wire: bytes, encoding: str = "identity", step: int = 100) -> list[bytes]:
    """Decode messages of at most 1,000 bytes. Compressed messages are decoded in steps of `step` bytes."""
    out = []
    for message, _, compressed in Assembler(1000).add(wire):
        inflater = Inflater(message, encoding, 1000) if compressed else None
        plain = None if inflater is not None else message
        while inflater is not None and plain is None:
            plain = inflater.step(step)
        assert plain is not None
        out.append(bytes(plain))
    return out


@given(st.binary(max_size=500), st.sampled_from(["gzip", "deflate"]), st.integers(1, 1000))
def test_compressed_messages(message: bytes, encoding: str, step: int) -> None:
    """A compressed message is decompressed to the original message, in steps of any size."""
    packed = gzip.compress(message) if encoding == "gzip" else zlib.compress(message)
    assert received(framed(packed, 1), encoding, step) == [message]


def test_a_step_ends_where_nothing_comes_out() -> None:
    """A compressed message of many empty blocks decompresses to no bytes at all. The work on it is still divided into
    bounded steps."""
    empty_blocks = b"\x00\x00\x00\xff\xff" * 100_000
    inflater = Inflater(gzip.compress(b"")[:10] + empty_blocks, "gzip", 1000)
    for _ in range(len(empty_blocks) // INFLATE_BYTES + 1):
        assert inflater.step(100) is None
    with pytest.raises(BadMessage, match="incomplete"):
        inflater.step(100)


@pytest.mark.parametrize(
    ("wire", "encoding", "too_large"),
    [
        (b"\x00" + (2000).to_bytes(4, "big"), "identity", True),
        (framed(gzip.compress(b"a" * 100_000), 1), "gzip", True),
        (framed(b"x", 1), "identity", False),
        (framed(b"x", 2), "gzip", False),
        (framed(b"no gzip at all", 1), "gzip", False),
        (framed(gzip.compress(b"cut short")[:-9], 1), "gzip", False),
    ],
    ids=["announced", "bomb", "no-encoding", "unknown-flag", "garbage", "truncated"],
)
def test_what_is_no_message_is_refused(wire: bytes, encoding: str, too_large: bool) -> None:
    """A malformed message is refused, and so is a message that is too large, before or after decompression."""
    with pytest.raises(BadMessage) as refused:
        received(wire, encoding)
    assert refused.value.too_large is too_large


@given(st.integers(0, 99_999_999), st.sampled_from("HMSmun"))
def test_timeouts(value: int, unit: str) -> None:
    """A timeout in any unit of the protocol is converted to seconds."""
    scale = {"H": 3600.0, "M": 60.0, "S": 1.0, "m": 1e-3, "u": 1e-6, "n": 1e-9}[unit]
    assert timeout_s(f"{value}{unit}".encode()) == pytest.approx(value * scale)


@pytest.mark.parametrize("wrong", [b"", b"1", b"S", b"-1S", b"123456789S", b"1.5S", b"1S "])
def test_wrong_timeouts(wrong: bytes) -> None:
    """An invalid timeout raises ValueError."""
    with pytest.raises(ValueError, match="grpc-timeout"):
        timeout_s(wrong)


@given(
    st.lists(
        st.one_of(st.tuples(st.just("x-a"), st.text("abc 1", min_size=1)), st.tuples(st.just("b-bin"), st.binary()))
    )
)
def test_metadata_comes_back(metadata: list[tuple[str, str | bytes]]) -> None:
    """Text and binary metadata are the same after encoding and decoding."""
    assert list(metadata_of(headers_of(metadata))) == metadata


def test_status_messages_are_printable_ascii() -> None:
    """A status message is encoded as printable ASCII."""
    assert status_message("a b%ü\n") == b"a b%25%C3%BC%0A"


@given(
    st.lists(st.tuples(st.binary(min_size=1, max_size=300), st.binary(max_size=40_000)), max_size=4),
    st.booleans(),
)
def test_any_client_reads_our_headers(fields: list[tuple[bytes, bytes]], end: bool) -> None:
    """The libraries hyperframe and hpack decode the header fields that Headrace sends, whatever the size of the fields
    and the number of frames."""
    raw = memoryview(header_frames((7).to_bytes(4, "big"), NO_TABLE + block(fields), end_stream=end))
    data, flags = b"", []
    while raw:
        frame, length = Frame.parse_frame_header(raw[:9])
        frame.parse_body(raw[9 : 9 + length])
        assert isinstance(frame, HeadersFrame | ContinuationFrame)
        assert frame.stream_id == 7
        assert length <= 16_384
        data += frame.data
        flags.append(frame.flags)
        raw = raw[9 + length :]
    assert ("END_STREAM" in flags[0]) is end
    assert ["END_HEADERS" in flag for flag in flags] == [False] * (len(flags) - 1) + [True]
    assert [(bytes(n), bytes(v)) for n, v in Decoder(max_header_list_size=1 << 20).decode(data, raw=True)] == fields


def test_the_head_of_a_call_is_parsed_and_its_error_is_reported() -> None:
    """RequestHead has the call's path, deadline, encoding and metadata. An invalid header field sets `problem` and
    raises nothing."""
    fields = [(b":method", b"POST"), (b":path", b"/a/B"), (b"content-type", b"application/grpc+proto"), (b"k", b"v")]
    assert RequestHead.of(fields, 7) == RequestHead("/a/B", (("k", "v"),), None, "identity", 7)
    with_time = RequestHead.of([*fields, (b"grpc-timeout", b"2S"), (b"grpc-encoding", b"gzip")], 0)
    assert (with_time.timeout_s, with_time.encoding) == (2.0, "gzip")
    for wrong in ((b"grpc-timeout", b"soon"), (b"x-bin", b"?")):
        assert RequestHead.of([*fields, wrong], 0).problem
    assert not RequestHead.of([(b":method", b"GET"), *fields[1:]], 0).is_grpc
    assert not RequestHead.of([*fields[:2], (b"content-type", b"text/plain")], 0).is_grpc
