"""JSON of the vectors in the answer of /v1/embeddings.

The gateway imports this module only after its start, because importing numpy and orjson is slow (deferred_imports.py).
"""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Iterator

from cluster.gateway.apis.float_json import floats_json


def embeddings(vectors: list[bytes], is_base64: bool = False) -> Iterator[bytes]:
    """Yield the JSON of each vector in an answer, and empty the list. The caller adds the commas. `is_base64`: whether
    a vector is written as the base64 text of its little-endian float32 values instead of an array of numbers."""
    vectors.reverse()
    for index in range(len(vectors)):
        vector = vectors.pop()
        values = b'"%b"' % b64encode(vector) if is_base64 else floats_json(vector)
        yield b'{"object":"embedding","index":%d,"embedding":%b}' % (index, values)
