"""How an EncodingPool and its helpers speak: every message has its length before it."""

from __future__ import annotations

import struct
from typing import Final

HEAD: Final = struct.Struct("<Q")
FAILED: Final = 2**64 - 1
"""In place of a length: the job raised; whoever asked finds out why by doing it."""
