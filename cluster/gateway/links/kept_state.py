"""The operator state that a gateway keeps for the next controller, in memory and in a file."""

from __future__ import annotations

from pathlib import Path

import structlog
from google.protobuf.message import DecodeError

from cluster.link.v1 import link_pb2 as pb
from cluster.process.private_files import make_missing_folders, replace_file
from cluster.wire.operator_state import MAX_BYTES

log = structlog.get_logger("hub")
FILE = "operator-state.bin"


class KeptOperatorState:
    """The newest operator state (the stored changes of operators) that any controller has sent. The gateway does not
    parse it."""

    def __init__(self, folder: Path | None = None) -> None:
        """`folder`: the gateway's folder; None: keep the state in memory only."""
        self._path = None if folder is None else folder / FILE
        self.newest = self._load()

    def keep(self, state: pb.OperatorState) -> None:
        """Keep a state. A state that is too large, or not newer than the kept state, is ignored."""
        if state.revision <= self.newest.revision or len(state.document) > MAX_BYTES:
            return
        self.newest = pb.OperatorState()
        self.newest.CopyFrom(state)
        if self._path is None:
            return
        try:
            make_missing_folders(self._path.parent)
            replace_file(self._path, state.SerializeToString())
        except OSError as error:  # it is still in memory, and at the other gateways
            log.warning("operator_state.not_stored", reason=str(error))

    def _load(self) -> pb.OperatorState:
        if self._path is None:
            return pb.OperatorState()
        try:
            return pb.OperatorState.FromString(self._path.read_bytes())
        except FileNotFoundError:
            return pb.OperatorState()
        except (OSError, DecodeError) as error:
            log.warning("operator_state.copy_not_read", reason=str(error))
            return pb.OperatorState()
