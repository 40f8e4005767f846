"""A connection's bytes are sent in one write per event-loop pass, and its answers share the client's flow-control
windows.
"""

from __future__ import annotations

import asyncio

from hypothesis import given
from hypothesis import strategies as st

from cluster.http2.frames import data_frame
from cluster.http2.h2_state import EndedStreams, ServerState
from cluster.http2.limits import FIRST_WINDOW_BYTES
from cluster.http2.output import UNAUTHENTICATED_UNSENT_BYTES, BlockedAnswers, ConnectionOutput, ReceiveWindows
from tests.support.transports import Sink

ID = (1).to_bytes(4, "big")


class Unread:
    """A counter of the calls of `on_unread`."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self) -> None:
        self.calls += 1


def begin() -> tuple[Sink, ServerState, ConnectionOutput, Unread]:
    """Create the output of a new connection. Returns the output's transport, its h2 state, the output, and the counter
    that it calls as `on_unread`."""
    sink, h2, unread = Sink(), ServerState(EndedStreams(1)), Unread()
    h2.initiate_connection()
    return sink, h2, ConnectionOutput(sink, h2, unread), unread


async def test_a_pass_is_one_write_and_only_answers_count() -> None:
    """All bytes of one event-loop pass are sent in one write. `payload_bytes` counts neither control frames nor frame
    headers."""
    sink, _, output, _ = begin()
    output.write_h2()
    output.write(data_frame(ID, b"abc"))
    output.write(data_frame(ID, b"de"))
    assert sink.writes == []
    await asyncio.sleep(0)
    assert len(sink.writes) == 1
    assert sink.writes[0].endswith(data_frame(ID, b"abc") + data_frame(ID, b"de"))
    assert output.payload_bytes == 5


async def test_a_client_that_does_not_read_is_reported_beyond_its_allowance() -> None:
    """`on_unread` is called when more unsent bytes wait than `allow_unsent` allows."""
    _, _, output, unread = begin()
    for allowed in (UNAUTHENTICATED_UNSENT_BYTES, 2 * UNAUTHENTICATED_UNSENT_BYTES):
        output.allow_unsent(allowed)
        output.write(b"x" * UNAUTHENTICATED_UNSENT_BYTES)
        await asyncio.sleep(0)
        assert unread.calls == 0
    output.write(b"x")
    await asyncio.sleep(0)
    assert unread.calls == 1


async def test_bytes_that_are_gathered_before_a_flush_go_into_the_same_write() -> None:
    """A function passed to `call_before_flush` is called once, and the bytes that it queues are sent in the next write.
    A function that raises or queues nothing does not affect other functions."""
    sink, _, output, _ = begin()
    failures: list[object] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: failures.append(context["exception"]))

    def fail() -> None:
        raise ValueError

    output.call_before_flush(fail)
    output.call_before_flush(lambda: output.write(b"gathered"))
    output.write(b"queued,")
    await asyncio.sleep(0)
    assert sink.writes == [b"queued,gathered"]
    assert [type(failure) for failure in failures] == [ValueError]
    output.call_before_flush(lambda: None)
    await asyncio.sleep(0)
    assert len(sink.writes) == 1, "nothing was queued"


async def test_a_function_that_is_added_during_a_flush_is_called_in_the_next_pass() -> None:
    """A function that runs before a flush may add another function with `call_before_flush`. The bytes that the first
    function writes are sent in this flush. The added function is called in the next event-loop pass."""
    sink, _, output, _ = begin()

    def again() -> None:
        output.write(b"first")
        output.call_before_flush(lambda: output.write(b"second"))

    output.call_before_flush(again)
    await asyncio.sleep(0)
    assert sink.writes == [b"first"]
    await asyncio.sleep(0)
    assert sink.writes == [b"first", b"second"]


async def test_what_is_queued_is_sent_before_the_close_and_nothing_after_it() -> None:
    """Closing sends the queued bytes; bytes that are queued later are dropped."""
    sink, _, output, _ = begin()
    output.write(b"last")
    output.close()
    assert output.closed
    output.write(b"late")
    await asyncio.sleep(0)
    assert sink.writes[0].startswith(b"last")
    assert len(sink.writes) == 1


class Answer:
    """An answer of which `left` bytes are still to be sent. Each call of `push` sends one byte. If bytes are left after
    that, the answer waits for the connection's window again."""

    def __init__(self, stream_id: int, left: int, h2: ServerState, blocked: BlockedAnswers, sent: list[int]) -> None:
        self.stream_id = stream_id
        self._left, self._h2, self._blocked, self._sent = left, h2, blocked, sent

    def push(self) -> None:
        self._h2.outbound_flow_control_window -= 1
        self._sent.append(self.stream_id)
        self._left -= 1
        if self._left:
            self._blocked.add(self.stream_id, self.push, of_stream=False)


@given(left=st.lists(st.integers(1, 5), min_size=1, max_size=6), window=st.integers(0, 30))
def test_answers_share_the_window_of_the_connection_in_turn(left: list[int], window: int) -> None:
    """While the connection's window is open, the waiting answers send in turn. Together they never send more than the
    window."""
    h2, sent = ServerState(EndedStreams(1)), list[int]()
    blocked = BlockedAnswers(h2)
    for stream_id, count in enumerate(left):
        blocked.add(stream_id, Answer(stream_id, count, h2, blocked, sent).push, of_stream=False)
    h2.outbound_flow_control_window = window
    blocked.push()
    rounds = [i for turn in range(max(left)) for i, count in enumerate(left) if count > turn]
    assert sent == rounds[:window]
    blocked.clear()
    h2.outbound_flow_control_window = 100
    blocked.push_all()
    assert sent == rounds[:window]


async def test_the_receive_window_grows_at_once_before_a_call_was_admitted_and_in_steps_afterwards() -> None:
    """Before a call is admitted, the receive window grows with each received byte. Afterwards it grows in steps of a
    quarter of the window."""
    _, h2, output, _ = begin()
    windows = ReceiveWindows(h2, output)
    windows.grow(1)
    assert h2.inbound_flow_control_window == FIRST_WINDOW_BYTES + 1
    windows.admit(100_000)
    held = h2.inbound_flow_control_window
    assert held == 100_001
    windows.grow(24_999)
    assert h2.inbound_flow_control_window == held
    windows.grow(1)
    assert h2.inbound_flow_control_window == held + 25_000
