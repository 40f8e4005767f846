"""The archive of a support bundle: the redacted parts, limited in size, and a manifest.

Only the owner of the archive file can read the file.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import tarfile
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cluster.cli.support.parts import MAX_BUNDLE_BYTES, MAX_PART_BYTES, Parts, as_text, cut
from cluster.cli.support.redaction import Redactor

MANIFEST = "manifest.json"


def redacted_files(parts: Parts, redactor: Redactor, about: Mapping[str, Any]) -> dict[str, bytes]:
    """Return the files of the bundle by name, the manifest first.

    `about`: more fields of the manifest. A part that still contains a secret after redaction is left out.
    """
    texts = {name: as_text(redactor.document(document)) for name, document in parts.documents.items()}
    texts |= {name: redactor.text(text) for name, text in parts.texts.items()}
    files: dict[str, bytes] = {}
    listed: list[dict[str, Any]] = []
    left_out = dict(parts.left_out)
    room = MAX_BUNDLE_BYTES
    for name, text in sorted(texts.items()):
        if not redactor.is_clean(text):
            left_out[name] = "a secret was still in it after redaction"
            continue
        data, is_cut = cut(text, min(MAX_PART_BYTES, room))
        room -= len(data)
        if not data and text:
            left_out[name] = f"the bundle has {MAX_BUNDLE_BYTES >> 20} MiB already"
            continue
        files[name] = data
        digest = hashlib.sha256(data).hexdigest()
        listed.append({"name": name, "bytes": len(data), "sha256": digest, "is_cut": is_cut})
    manifest = {
        **about,
        "files": listed,
        "left_out": [{"name": name, "reason": reason} for name, reason in sorted(left_out.items())],
        "replaced_secrets": redactor.replaced,
    }
    # with hashed names, the manifest must not have the tenants' names either
    return {MANIFEST: as_text(redactor.document(manifest)).encode("utf-8", "backslashreplace"), **files}


def write_archive(file: Path, files: Mapping[str, bytes], folder: str, at_s: float) -> None:
    """Write the files into a .tar.gz archive with mode 0600. A failed write leaves no archive.

    `folder`: folder in the archive that contains the files. `at_s`: time of all files, in seconds since the epoch.
    Raises OSError.
    """
    handle, scratch = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}-")  # created with mode 0600
    try:
        with os.fdopen(handle, "wb") as target, tarfile.open(fileobj=target, mode="w:gz") as archive:
            for name, data in files.items():
                entry = tarfile.TarInfo(f"{folder}/{name}")
                entry.size, entry.mode, entry.mtime = len(data), 0o600, int(at_s)
                archive.addfile(entry, io.BytesIO(data))
        Path(scratch).replace(file)
    except BaseException:  # Ctrl-C too: it must leave no scratch file
        with contextlib.suppress(OSError):
            Path(scratch).unlink()
        raise
