"""Program: make a checkpoint (or only a tokenizer) and its bundle. In a process of its own: it imports transformers.

    python -m loadtests.serving.prepare KIND FOLDER

writes FOLDER/model and FOLDER/bundle. KIND is `llama` (a tiny checkpoint with random weights), `tokenizer` (the same
without weights) or `big` (a tokenizer of 128,000 pieces).
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from cluster.engine.bundles import build_bundle
from tests.support import checkpoints

MAX_POSITION_TOKENS = 262_144
"""Of tokenizers without weights: a simulated engine's context is not bounded by any model's."""


def main(kind: str, folder: Path) -> None:
    """Write model and bundle; what is there stays."""
    model, bundle = folder / "model", folder / "bundle"
    if bundle.exists():
        return
    if kind == "llama":
        checkpoints.build_checkpoint("llama", model)
        # Greedy and nothing else, on every face: the published models' sampling defaults are not what is measured.
        (model / "generation_config.json").write_text(json.dumps({"eos_token_id": _eos(model)}) + "\n")
    elif kind == "tokenizer":
        checkpoints.build_tokenizer("llama", model)
        vocab = checkpoints.VOCAB_SIZES["llama"]
        config = {"model_type": "llama", "vocab_size": vocab, "max_position_embeddings": MAX_POSITION_TOKENS}
        (model / "config.json").write_text(json.dumps(config) + "\n")
    elif kind == "big":
        checkpoints.big_tokenizer(model)
    else:
        raise SystemExit(f"unknown kind {kind!r}")
    build_bundle(model).save(bundle)


def _eos(model: Path) -> object:
    return json.loads((model / "config.json").read_text())["eos_token_id"]


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
