"""Which streams of a connection a reset has ended: what h2 asks of one that is over, when a frame for it comes late.

h2 itself notes every stream that has ended, up to 65,536 of a connection, which are 10 MB; of those that ended in order
nothing is ever asked but which error ends the connection.
"""

from __future__ import annotations

from collections import OrderedDict

from h2.stream import StreamClosedBy

_RESETS = (StreamClosedBy.SEND_RST_STREAM, StreamClosedBy.RECV_RST_STREAM)


class EndedStreams(OrderedDict[int, StreamClosedBy | None]):
    """In place of h2's own notes: the last `most` that were reset."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self.most = most

    def __setitem__(self, stream_id: int, by: StreamClosedBy | None) -> None:
        if by not in _RESETS:
            return
        super().__setitem__(stream_id, by)
        while len(self) > self.most:
            self.popitem(last=False)
