"""Adapters of a small model, and the tokens of the model after one adapter is merged into its weights."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cluster.worker.weights.adapter import adapter_digest, base_shapes, check_adapter
from tests.support.adapters import adapter_arrays, write_adapter


class MergedAdapters:
    """LoRA adapters for tests, numbered from 1, and the tokens that they should produce: the tokens of the base model
    with the adapter merged into its weights."""

    def __init__(self, base: Path, root: Path, *, rank: int = 8, alpha: float = 16.0) -> None:
        """`root`: folder for the adapters. `rank` and `alpha`: of all adapters."""
        self._base = base
        self._root = root
        self._rank = rank
        self._alpha = alpha
        self._models: dict[int, Any] = {}

    def folder(self, number: int) -> Path:
        """Return the folder of an adapter. As in a worker's store, the folder's name is the adapter's digest."""
        made = write_adapter(self._root / f"made-{number}", self._base, self._rank, number, alpha=self._alpha)
        check_adapter(made, base_shapes(self._base), self._rank)
        folder = self._root / adapter_digest(made)
        if not folder.exists():
            made.rename(folder)
        return folder

    def merged_tokens(self, number: int, prompt: Sequence[int], count: int) -> tuple[int, ...]:
        """Return `count` greedy tokens of the base model with adapter `number` merged. Number 0 is the base model
        alone."""
        import torch

        model, ids = self._merged(number), list(prompt)
        with torch.no_grad():
            for _ in range(count):
                ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        return tuple(ids[len(prompt) :])

    def _merged(self, number: int) -> Any:
        import torch
        from transformers import AutoModelForCausalLM

        if number not in self._models:
            model = AutoModelForCausalLM.from_pretrained(str(self._base), dtype=torch.float32)
            layers = dict(model.named_parameters())
            arrays = adapter_arrays(self._base, self._rank, number) if number else {}
            for name in filter(lambda name: ".lora_A." in name, arrays):
                change = arrays[name.replace(".lora_A.", ".lora_B.")].astype(np.float64) @ arrays[name]
                layer = layers[name.removeprefix("base_model.model.").replace(".lora_A.", ".")]
                layer.data += torch.tensor(change * self._alpha / self._rank, dtype=torch.float32)
            self._models[number] = model.eval()
        return self._models[number]
