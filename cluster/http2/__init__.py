"""A gRPC server on asyncio that joins all writes of one event-loop pass into one send per connection.

grpc.aio passes each message through a queue, a completion and a wake-up. This takes about 20 µs per message, and a
gateway writes a message for every token. In this package the library h2 keeps HTTP/2's state (headers, settings,
windows, resets), and only DATA frames are made by hand. Handlers have grpc's own interface, so generated servicers and
InferenceApi run both on this server and on grpc.aio's server.
"""

from hyperframe.frame import Frame

from cluster.http2.connection_table import ConnectionSlot, ConnectionStage, ConnectionTable, Port
from cluster.http2.limits import ServerLimits
from cluster.http2.listener import ConnectionAdmission, LimitedLog, Listener, listening_socket
from cluster.http2.server import Server

# For a disabled debug log, h2 builds a repr of every received frame, with the frame's whole body.
Frame.__repr__ = object.__repr__  # type: ignore[method-assign]

__all__ = [
    "ConnectionAdmission",
    "ConnectionSlot",
    "ConnectionStage",
    "ConnectionTable",
    "LimitedLog",
    "Listener",
    "Port",
    "Server",
    "ServerLimits",
    "listening_socket",
]
