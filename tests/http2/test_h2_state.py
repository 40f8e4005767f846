"""A connection keeps little memory for ended calls."""

from __future__ import annotations

from h2.stream import StreamClosedBy
from hyperframe.frame import DataFrame, RstStreamFrame
from hypothesis import given
from hypothesis import strategies as st

from cluster.http2.h2_state import EndedStreams
from tests.http2.conftest import Serve
from tests.http2.raw import raw_client

RESETS = (StreamClosedBy.SEND_RST_STREAM, StreamClosedBy.RECV_RST_STREAM)


async def test_calls_that_ended_in_order_leave_nothing(serve: Serve) -> None:
    """The connection keeps no state of a call that ended normally. The library h2 by itself would keep 160 bytes for
    each of the last 65,536 calls."""
    async with serve() as echo, raw_client(echo.port) as raw:
        for number in range(200):
            await raw.until_ended(await raw.call("One", b"%d" % number))
        (connection,) = echo.server.connections
        assert len(connection.core.h2.streams) <= 2
        assert not connection.core.h2._closed_streams


async def test_what_comes_late_for_a_reset_call_ends_no_connection(serve: Serve) -> None:
    """After a late frame for a reset stream, the connection stays open and serves other calls."""
    async with serve() as echo, raw_client(echo.port) as raw:
        stream_id = await raw.call("Forever", b"", end=False)
        await raw.send(RstStreamFrame(stream_id).serialize())
        await raw.until_ended(await raw.call("One", b"counts the streams that are open, and forgets the others"))
        await raw.send(DataFrame(stream_id, data=b"late").serialize())
        trailers = await raw.until_ended(await raw.call("One", b"again"))
        assert trailers["grpc-status"] == "0"
        assert raw.goaway is None


@given(st.integers(1, 5), st.lists(st.sampled_from([None, *StreamClosedBy]), max_size=30))
def test_the_last_resets_are_known(most: int, ends: list[StreamClosedBy | None]) -> None:
    """EndedStreams keeps the last `most` streams that were reset, in the same form as h2 does. It keeps no stream that
    ended in another way."""
    kept = EndedStreams(most)
    for stream_id, by in enumerate(ends):
        kept[stream_id] = by
    resets = [(stream_id, by) for stream_id, by in enumerate(ends) if by in RESETS]
    assert list(kept.items()) == resets[-most:]
