"""Program that receives spans by OTLP over gRPC, and drops them: the collector of a load test.

python -m loadtests.serving.otlp_sink --port PORT
"""

from __future__ import annotations

import argparse
import asyncio
from typing import Any

import grpc

EXPORT = "/opentelemetry.proto.collector.trace.v1.TraceService/Export"


class _Sink(grpc.GenericRpcHandler):
    """The service of a collector. An empty answer says that all spans were accepted."""

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> Any:
        """Return the handler of Export, and None for any other method."""
        if handler_call_details.method != EXPORT:
            return None
        return grpc.unary_unary_rpc_method_handler(self._export)

    @staticmethod
    async def _export(request: bytes, context: Any) -> bytes:
        return b""


async def serve(port: int) -> None:
    """Serve on loopback until cancelled."""
    server = grpc.aio.server()
    server.add_generic_rpc_handlers((_Sink(),))
    server.add_insecure_port(f"127.0.0.1:{port}")
    await server.start()
    await server.wait_for_termination()


if __name__ == "__main__":
    options = argparse.ArgumentParser()
    options.add_argument("--port", type=int, required=True)
    asyncio.run(serve(options.parse_args().port))
