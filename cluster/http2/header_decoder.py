"""A decoder of header blocks. It remembers the fields of each block that does not change the dynamic header table.

gRPC's C core sends the same bytes for each call of one method with one credential: indexed fields, and literals that
are not added to the table. The fields of such a block depend only on its bytes and the table, so the memory is cleared
when the table changes. Without the memory, decoding a block takes a tenth of the CPU time of a short call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Final

from hpack import Decoder, HeaderTuple
from hpack.table import HeaderTable

MAX_BLOCKS: Final = 8
MAX_BLOCK_BYTES: Final = 512
MAX_FIELDS: Final = 32
"""MAX_BLOCKS, MAX_BLOCK_BYTES and MAX_FIELDS: limits of a decoder's memory of blocks. Together they bound the memory to
48 KiB for each connection."""
_SIZE_UPDATE: Final = 0x20


class _Table(HeaderTable):
    """A header table that calls a function when an entry is added."""

    def __init__(self, on_add: Callable[[], None]) -> None:
        super().__init__()
        self._on_add = on_add

    def add(self, name: bytes, value: bytes) -> None:
        """See hpack's HeaderTable."""
        super().add(name, value)
        self._on_add()


class HeaderDecoder(Decoder):
    """hpack's decoder with a memory of decoded blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.header_table = _Table(self._table_changed)
        self._known: dict[bytes, list[HeaderTuple]] = {}
        self._changes = 0

    def decode(self, data: bytes, raw: bool = False) -> Iterable[HeaderTuple]:
        """Return the header fields of a block, like hpack's `Decoder.decode`. `raw`: return bytes instead of text. Only
        results with `raw` are remembered, so the caller must not change the returned list."""
        if not raw:
            return super().decode(data, raw)
        known = self._known.get(data)
        if known is not None:
            return known
        changes = self._changes
        fields = list(super().decode(data, raw))
        if data and data[0] & 0xE0 == _SIZE_UPDATE:
            self._table_changed()
        elif changes == self._changes and len(data) <= MAX_BLOCK_BYTES and len(fields) <= MAX_FIELDS:
            if len(self._known) >= MAX_BLOCKS:
                self._known.clear()
            self._known[bytes(data)] = fields
        return fields

    def _table_changed(self) -> None:
        self._changes += 1
        self._known.clear()
