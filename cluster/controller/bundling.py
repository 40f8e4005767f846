"""Builds a model's tokenizer bundle in a separate process: `python -m cluster.controller.bundling SETTINGS FOLDER`.

Loading a tokenizer as the engine does imports transformers, which takes seconds and hundreds of megabytes. The
controller must spend neither that time nor that memory. The process writes the bundle to FOLDER/<digest> and prints
`{"digest": ..., "license": ..., "card": {...}}` or `{"error": ...}`.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from cluster.policy.catalog.lifecycle import SourceFacts
from cluster.wire.bundle import Bundle, sampling_defaults
from cluster.worker import settings as replica_settings
from cluster.worker.settings import ReplicaSettings

_NICENESS = 10  # lower priority than an engine that loads at the same time


async def build(settings: ReplicaSettings, folder: Path) -> tuple[Bundle | None, SourceFacts]:
    """Build a bundle, and return the bundle with the model's properties. If the build fails, return None with the
    reason in `trouble`."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "cluster.controller.bundling",
        json.dumps(settings.to_json()),
        str(folder),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
    )
    try:
        out, _ = await process.communicate()
    except asyncio.CancelledError:
        process.kill()
        await process.wait()
        raise
    lines = out.decode().splitlines()
    answer: dict[str, Any] = (
        json.loads(lines[-1])
        if lines
        else {"error": f"the process that builds the tokenizer bundle ended with status {process.returncode}"}
    )
    if "error" in answer:
        return None, SourceFacts(trouble=str(answer["error"]))
    bundle = Bundle.load(folder / _folder_name(answer["digest"]))
    about = describe(bundle)
    return bundle, replace(about, license=str(answer.get("license", "")), card=dict(answer.get("card", {})))


def describe(bundle: Bundle) -> SourceFacts:
    """Return the properties of a model that are stored in the model's bundle."""
    config = json.loads(bundle.files.get("config.json", b"{}"))
    return SourceFacts(
        bundle_digest=bundle.digest,
        max_model_len=int(config.get("max_position_embeddings") or 0),
        family=str(config.get("model_type") or ""),
        default_sampling=sampling_defaults(json.loads(bundle.files.get("generation_config.json", b"{}"))),
    )


def _folder_name(digest: str) -> str:
    return digest.replace(":", "-")


def main(arguments: list[str]) -> int:
    """Build and save a bundle, and print the digest of the bundle. Returns the exit status."""
    from cluster.worker.open_model import open_bundle

    os.nice(_NICENESS)
    settings, folder = replica_settings.from_json(json.loads(arguments[0])), Path(arguments[1])
    try:
        bundle, card = open_bundle(settings)
        bundle.save(folder / _folder_name(bundle.digest))
    except (ValueError, OSError) as error:
        print(json.dumps({"error": str(error)}))
        return 1
    print(json.dumps({"digest": bundle.digest, "license": card.license, "card": dict(card.fields)}))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
