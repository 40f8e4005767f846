"""Notes of the streams that were reset. h2 needs a stream's note when a late frame arrives for the ended stream.

h2 itself keeps a note of every ended stream, up to 65,536 per connection, which take 10 MB. For a stream that ended
normally, the note only decides which error ends the connection when a late frame arrives.
"""

from __future__ import annotations

from collections import OrderedDict

from h2.stream import StreamClosedBy

_RESETS = (StreamClosedBy.SEND_RST_STREAM, StreamClosedBy.RECV_RST_STREAM)


class EndedStreams(OrderedDict[int, StreamClosedBy | None]):
    """A replacement for h2's notes of ended streams. Only the last `most` streams that were reset are kept."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self.most = most

    def __setitem__(self, stream_id: int, by: StreamClosedBy | None) -> None:
        if by not in _RESETS:
            return
        super().__setitem__(stream_id, by)
        while len(self) > self.most:
            self.popitem(last=False)
