"""Token ids of long prompts in a packed form, so that no Python object is made for each id.

Problem: vLLM's request has a list of integers. For a prompt of 142,000 ids, making and encoding this list takes 4 ms of
the worker's event loop. All of this time is spent on objects that nothing reads.

Method: numpy encodes the ids in the form that the engine core expects, an array of MessagePack integers. `msgspec.Raw`
makes vLLM's encoder copy the result unchanged.
"""

from __future__ import annotations

from array import array
from typing import Any, Final

MIN_IDS: Final = 512
"""Number of ids from which packed ids are faster than a list."""
_ARRAY, _UINT16, _UINT32 = 0xDD, 0xCD, 0xCE
"""First bytes of MessagePack's `array 32`, `uint 16` and `uint 32`."""


def packed(ids: array[int]) -> Any:
    """Return a value that vLLM's encoder writes as a list of these ids. `ids`: unsigned integers of at most 32 bits."""
    import msgspec
    import numpy as np

    values = np.frombuffer(ids, np.dtype(ids.typecode))
    first, kind = (_UINT16, ">u2") if not len(values) or values.max() < 1 << 16 else (_UINT32, ">u4")
    out = np.empty(len(values), np.dtype([("first", "u1"), ("id", kind)]))
    out["first"], out["id"] = first, values
    return msgspec.Raw(bytes([_ARRAY]) + len(values).to_bytes(4, "big") + out.tobytes())


def takes_packed(request: type, encoder: type, decoder: type) -> bool:
    """Return whether the engine core of the installed vLLM receives packed ids as a list.

    `request`, `encoder`, `decoder`: vLLM's class of requests, and the classes that encode and decode them.
    """
    ids = [0, 1, 255, 256, 65_535, 70_000]
    try:
        given = request("r", packed(array("I", ids)), None, None, None, 0.0, None, None, None)
        return bool(decoder(request).decode(encoder().encode(given)).prompt_token_ids == ids)
    except Exception:  # any failure means that this release works in another way: lists are sent then
        return False
