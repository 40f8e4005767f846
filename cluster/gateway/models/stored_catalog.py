"""The last catalog, which a gateway keeps in a file for its next start."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import structlog

from cluster.api.types import CatalogEntry
from cluster.link.v1 import link_pb2 as pb
from cluster.process.private_files import make_missing_folders, replace_file
from cluster.wire.codecs import codec

log = structlog.get_logger("directory")


class StoredCatalog:
    """The file with the last catalog in a gateway's folder."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / "catalog.json"

    def save(self, entries: Sequence[CatalogEntry], revision: int) -> None:
        """Write this catalog to the file, in place of the previous catalog. Raises OSError."""
        make_missing_folders(self._path.parent)
        models = [codec.entry_to_pb(entry).SerializeToString().hex() for entry in entries]
        replace_file(self._path, json.dumps({"revision": revision, "models": models}))

    def load(self) -> tuple[int, Sequence[CatalogEntry]]:
        """Return the revision and the models of the last catalog; (0, ()) if the file is missing or cannot be read."""
        try:
            values = json.loads(self._path.read_text())
            revision, lines = (values["revision"], values["models"]) if isinstance(values, dict) else (0, values)
            models = [pb.CatalogModel.FromString(bytes.fromhex(line)) for line in lines]
            return int(revision), [codec.entry_from_pb(model) for model in models]
        except FileNotFoundError:
            return 0, ()
        except (ValueError, KeyError, TypeError, OSError) as error:
            log.warning("catalog.copy_not_read", path=str(self._path), reason=str(error))
            return 0, ()
