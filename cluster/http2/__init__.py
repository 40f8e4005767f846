"""A gRPC server on the event loop: one send for all that one pass writes to a connection.

grpc.aio writes each message through a queue, a completion and a wake of its own, about 20 µs; a gateway writes every
token. Here HTTP/2's state (headers, settings, windows, resets) is h2's and only DATA frames are made by hand. Handlers
are grpc's own: generated servicers and InferenceApi run on either server.
"""

from hyperframe.frame import Frame

from cluster.http2.connection_table import ConnectionStage, ConnectionTable, Held, Port
from cluster.http2.limited_log import LimitedLog
from cluster.http2.limits import ServerLimits
from cluster.http2.listener import ConnectionAdmission, Listener, listening
from cluster.http2.server import Server

# h2 writes out every frame that it receives, its whole body serialized once more, for a trace that is off.
Frame.__repr__ = object.__repr__  # type: ignore[method-assign]

__all__ = [
    "ConnectionAdmission",
    "ConnectionStage",
    "ConnectionTable",
    "Held",
    "LimitedLog",
    "Listener",
    "Port",
    "Server",
    "ServerLimits",
    "listening",
]
