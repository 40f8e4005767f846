"""Program that makes a checkpoint (or only a tokenizer) and its bundle. It is a separate process, since it imports
transformers.

    python -m loadtests.serving.prepare KIND FOLDER

The program writes FOLDER/model and FOLDER/bundle. KIND is `llama` (a tiny checkpoint with random weights), `tokenizer`
(the same checkpoint without weights), `big` (a tokenizer of 128,000 pieces), `minilm` (the embedding model of the demo)
or the folder of a checkpoint, which is used in place.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from cluster.worker.weights.tokenizer_bundle import build_bundle
from tests.support import checkpoints, pooling_models

MAX_POSITION_TOKENS = 262_144
"""Context of tokenizers without weights, in tokens. No model limits the context of a simulated engine."""


def main(kind: str, folder: Path) -> None:
    """Write the model and the bundle. Existing folders stay."""
    model, bundle = folder / "model", folder / "bundle"
    if bundle.exists():
        return
    if kind == "llama":
        checkpoints.build_checkpoint("llama", model)
        # Decode greedily on every API. The sampling defaults that models publish are not measured.
        _greedy(model)
    elif kind == "tokenizer":
        checkpoints.build_tokenizer("llama", model)
        vocab = checkpoints.VOCAB_SIZES["llama"]
        config = {"model_type": "llama", "vocab_size": vocab, "max_position_embeddings": MAX_POSITION_TOKENS}
        (model / "config.json").write_text(json.dumps(config) + "\n")
    elif kind == "big":
        checkpoints.big_tokenizer(model)
    elif kind == "minilm":
        model.symlink_to(pooling_models.minilm(folder))
    elif Path(kind).is_dir():
        _link_files(Path(kind), model)
    else:
        raise SystemExit(f"unknown kind {kind!r}")
    build_bundle(model).save(bundle)


def _greedy(model: Path) -> None:
    eos = json.loads((model / "config.json").read_text()).get("eos_token_id")
    (model / "generation_config.json").write_text(json.dumps({} if eos is None else {"eos_token_id": eos}) + "\n")


def _link_files(there: Path, model: Path) -> None:
    """Make a folder of links to a checkpoint's files, without the checkpoint's sampling defaults."""
    model.mkdir(parents=True, exist_ok=True)
    for file in there.iterdir():
        if file.name != "generation_config.json":
            (model / file.name).symlink_to(file.resolve())
    _greedy(model)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
