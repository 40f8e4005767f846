"""Notes of the streams that were reset: h2 needs them when a late frame arrives for an ended stream.

h2 itself notes every ended stream, up to 65,536 per connection, which take 10 MB. For streams that ended normally the
note only decides which error ends the connection.
"""

from __future__ import annotations

from collections import OrderedDict

from h2.stream import StreamClosedBy

_RESETS = (StreamClosedBy.SEND_RST_STREAM, StreamClosedBy.RECV_RST_STREAM)


class EndedStreams(OrderedDict[int, StreamClosedBy | None]):
    """A replacement of h2's notes that keeps only the last `most` streams that were reset."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self.most = most

    def __setitem__(self, stream_id: int, by: StreamClosedBy | None) -> None:
        if by not in _RESETS:
            return
        super().__setitem__(stream_id, by)
        while len(self) > self.most:
            self.popitem(last=False)
