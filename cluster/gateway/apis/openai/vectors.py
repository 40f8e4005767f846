"""JSON of the vectors in the answer of /v1/embeddings.

Not imported at the start: deferred_imports.py.
"""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Iterator, Sequence
from typing import Final

import msgspec

from cluster.gateway.apis.float_json import short_floats

VALUES: Final = 4096
"""Number of values that are written together: enough for numpy, and little enough for the processor's cache."""
_encode = msgspec.json.Encoder().encode


def embeddings(vectors: Sequence[bytes | memoryview], is_base64: bool = False) -> Iterator[bytes]:
    """Yield vectors as the JSON of an answer, some at a time and without commas between them. `is_base64`: as base64 of
    their little-endian float32 values, which costs no work for each value."""
    at = 0
    while at < len(vectors):
        some = vectors[at : at + max(VALUES * 4 // max(len(vectors[at]), 1), 1)]
        yield b",".join(_items(at, some, is_base64))
        at += len(some)


def _items(first: int, vectors: Sequence[bytes | memoryview], is_base64: bool) -> Iterator[bytes]:
    floats = [] if is_base64 else short_floats(b"".join(vectors))
    at = 0
    for index, vector in enumerate(vectors, first):
        if is_base64:
            values = b'"' + b64encode(vector) + b'"'
        else:
            count = len(vector) // 4
            values = _encode(floats[at : at + count])
            at += count
        yield b'{"object":"embedding","index":%d,"embedding":%b}' % (index, values)
