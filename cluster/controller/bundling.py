"""Builds a model's tokenizer bundle in a separate process: `python -m cluster.controller.bundling SETTINGS FOLDER`.

A tokenizer is loaded with transformers, as in the engine. Importing transformers takes seconds and hundreds of
megabytes. A separate process keeps this cost out of the controller. The process writes the bundle to FOLDER/<digest>
and prints `{"digest": ..., "license": ..., "card": {...}}` or `{"error": ...}`.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import structlog

from cluster.api.types import MAX_INT32
from cluster.policy.catalog.lifecycle import SourceFacts
from cluster.wire.bundle import Bundle, sampling_defaults
from cluster.worker import settings as replica_settings
from cluster.worker.settings import ReplicaSettings

log = structlog.get_logger("controller")

_NICENESS = 10  # lower priority than an engine that loads at the same time


async def build(settings: ReplicaSettings, folder: Path) -> tuple[Bundle | None, SourceFacts]:
    """Build a model's bundle, and return the bundle and the model's properties. If the build fails, the bundle is None
    and `SourceFacts.trouble` has the reason."""
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
    try:
        about = describe(bundle)
    except (ValueError, TypeError, AttributeError) as error:  # the files are a stranger's: must not end the controller
        return None, SourceFacts(trouble=f"config.json or generation_config.json cannot be read: {error}")
    return bundle, replace(about, license=str(answer.get("license", "")), card=dict(answer.get("card", {})))


class BundleBuilder:
    """Builds tokenizer bundles, one at a time, for models whose source is on this host.

    With a bundle, gateways can tokenize prompts for a model that has no replica.
    """

    def __init__(self, folder: Path, *, local: bool) -> None:
        """`folder`: the folder for built bundles. `local`: replicas run on this host, so every model's source can be
        read here."""
        self._folder = folder
        self._local = local
        self._bundles: dict[str, Bundle] = {}
        self.known: dict[str, SourceFacts] = {}
        """Properties that were read from the models' sources. The keys are names of applications."""
        self._todo: asyncio.Queue[ReplicaSettings] = asyncio.Queue()

    def bundle(self, digest: str) -> Bundle | None:
        """Return the built bundle with a digest, or None if this builder has no such bundle."""
        return self._bundles.get(digest)

    def want(self, settings: Sequence[ReplicaSettings]) -> None:
        """Queue the bundles of these replicas for building. Bundles that exist already are skipped."""
        for variant in settings:
            self._todo.put_nowait(variant)

    async def run(self) -> None:
        """Build bundles until cancelled."""
        while True:
            settings = await self._todo.get()
            is_here = self._local or await asyncio.to_thread(Path(settings.spec.source).is_dir)
            if not is_here or settings.app in self.known:
                continue
            bundle, about = await build(settings, self._folder)
            self.known[settings.app] = about
            if bundle is not None:
                self._bundles[bundle.digest] = bundle
            else:
                log.warning("bundle.not_built", model=settings.spec.name, reason=about.trouble)


def describe(bundle: Bundle) -> SourceFacts:
    """Return the properties of a model that are stored in the model's bundle."""
    config = json.loads(bundle.files.get("config.json", b"{}"))
    length = config.get("max_position_embeddings")
    is_length = isinstance(length, int) and 0 < length <= MAX_INT32
    return SourceFacts(
        bundle_digest=bundle.digest,
        max_model_len=length if is_length else 0,
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
