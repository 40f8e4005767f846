"""Program that receives spans by OTLP over gRPC, and drops them: the collector of a load test.

python -m loadtests.serving.otlp_sink --port PORT
"""

from __future__ import annotations

import argparse

from cluster.observe.otlp_receiver import OtlpReceiver


def create(port: int) -> OtlpReceiver:
    """Return a receiver on loopback that drops all spans. Port 0 picks a free port."""
    return OtlpReceiver(f"127.0.0.1:{port}", lambda _: None)


if __name__ == "__main__":
    options = argparse.ArgumentParser()
    options.add_argument("--port", type=int, required=True)
    sink = create(options.parse_args().port)
    sink.start()
    sink.wait()
