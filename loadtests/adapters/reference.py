"""Compute vectors of texts with the library transformers: python -m loadtests.adapters.reference MODEL TEXTS OUT

MODEL is the folder of all-MiniLM-L6-v2. TEXTS is a file with a JSON list. OUT is a file for a numpy array of the shape
(texts, dimensions). A vector is the mean of the last hidden states of all tokens, normalized to norm 1, as the model's
card says.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModel, AutoTokenizer


def main(model: str, texts: Path, out: Path) -> None:
    """Compute the vectors of the texts and write them to `out`. The file is written under another name first and then
    renamed, so it appears complete."""
    tokenizer, network = AutoTokenizer.from_pretrained(model), AutoModel.from_pretrained(model, dtype=torch.float32)
    vectors = []
    with torch.inference_mode():
        for text in json.loads(texts.read_text()):
            state = network(**tokenizer(text, return_tensors="pt")).last_hidden_state[0]
            vectors.append(torch.nn.functional.normalize(state.mean(dim=0), dim=0).numpy())
    unfinished = out.with_suffix(".part.npy")
    np.save(unfinished, np.stack(vectors))
    os.replace(unfinished, out)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
