"""JSON of single vectors in the answer of /v1/embeddings.

Not imported at the start: deferred_imports.py.
"""

from __future__ import annotations

from base64 import b64encode

from cluster.gateway.apis.float_json import json_floats


def embedding(index: int, vector: bytes | memoryview, is_base64: bool = False) -> bytes:
    """Return a vector as the JSON of an answer. `is_base64`: as base64 of its little-endian float32 values, which costs
    no work for each value."""
    values = b'"' + b64encode(vector) + b'"' if is_base64 else json_floats(vector)
    return b'{"object":"embedding","index":%d,"embedding":%b}' % (index, values)
