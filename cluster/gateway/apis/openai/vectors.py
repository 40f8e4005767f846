"""JSON of the vectors in the answer of /v1/embeddings.

Not imported at the start: deferred_imports.py.
"""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Iterator, Sequence

from cluster.gateway.apis.float_json import floats_json


def embeddings(vectors: Sequence[bytes], is_base64: bool = False) -> Iterator[bytes]:
    """Yield vectors as the JSON of an answer, without commas between them. `is_base64`: as base64 of their
    little-endian float32 values."""
    for index, vector in enumerate(vectors):
        values = b'"%b"' % b64encode(vector) if is_base64 else floats_json(vector)
        yield b'{"object":"embedding","index":%d,"embedding":%b}' % (index, values)
