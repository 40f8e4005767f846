"""Program that checks each row of a full batch: python -m loadtests.adapters.engine_rows MODEL FOLDER RANKS OUT

A row is one request of a batch, with an adapter or with the base model. The program starts vLLM's engine with eight
slots for adapters on RANKS ranks, loads eight adapters, and computes batches in which the base model and all
adapters have rows. It then computes the same rows a second time, each resumed after its first tokens. The tokens of
each row are compared with the greedy tokens of transformers' model into which the adapter's weights are merged. The
program writes the counts of rows to OUT, as JSON.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import random
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from cluster.api.types import EngineRequest, ModelSpec, Sampling
from cluster.worker.engine.vllm.engine import VllmEngine
from tests.support.merged_adapters import MergedAdapters

SLOTS, PROMPT_TOKENS, ANSWER_TOKENS, BATCHES = 8, 40, 16, 3
CUTS = (1, 7, ANSWER_TOKENS - 1)
TOKEN_LO, TOKEN_HI = 300, 700
"""Range of ordinary ids in the tiny tokenizer."""
ENGINE = {
    "kv_cache_memory_bytes": 64 << 20, "max_num_seqs": 16, "max_num_batched_tokens": 1024, "block_size": 32,
    "enable_lora": True, "max_loras": SLOTS, "max_cpu_loras": SLOTS, "max_lora_rank": 8,
}  # fmt: skip


@dataclass(slots=True)
class RowCounts:
    """Counts of rows, which are the requests of a batch. `differ`: rows whose tokens differ from the greedy tokens of
    the model with merged adapter weights. `resumed_differ`: the same for resumed rows. `together`: the largest number
    of rows with an output in one step. `engine_class`: dtype, quantization and parallelism of the engine."""

    engine_class: str = ""
    rows: int = 0
    differ: int = 0
    resumed: int = 0
    resumed_differ: int = 0
    together: int = 0


@dataclass(frozen=True, slots=True)
class BatchRow:
    """A row of a batch. `adapter`: digest of its adapter, "" for the base model. `expected`: the greedy tokens of a
    model into whose weights the adapter was merged."""

    adapter: str
    prompt: tuple[int, ...]
    expected: tuple[int, ...]


class Rows:
    """Computes rows (prompts with expected tokens) on an engine, in batches."""

    def __init__(self, engine: VllmEngine, counts: RowCounts) -> None:
        self._engine = engine
        self._counts = counts
        self._numbers = itertools.count()

    async def run(self, rows: Sequence[BatchRow], cut: int = 0) -> list[tuple[int, ...]]:
        """Compute rows in one batch; return the tokens of each row. Each row is resumed after its first `cut` expected
        tokens, as if another engine had emitted them; 0 starts each row from its prompt."""
        tokens: dict[str, list[int]] = {}
        for row in rows:
            request = EngineRequest(
                f"row-{next(self._numbers)}", row.prompt,
                Sampling(max_tokens=ANSWER_TOKENS, temperature=0.0, ignore_eos=True),
                emitted_token_ids=row.expected[:cut], adapter=row.adapter,
            )  # fmt: skip
            tokens[request.request_id] = list(row.expected[:cut])
            await self._engine.submit(request)
        left = len(rows)
        while left:
            outputs = await self._engine.step()
            self._counts.together = max(self._counts.together, len(outputs))
            for output in outputs:
                tokens[output.request_id] += output.token_ids
                left -= output.finish is not None
        return [tuple(ids) for ids in tokens.values()]


async def count(model: Path, folder: Path, ranks: int) -> RowCounts:
    """Compute all batches and return the counts of rows."""
    adapters, rng, counts = MergedAdapters(model, folder, rank=8), random.Random(ranks), RowCounts()
    spec = ModelSpec(
        "rows", "unused", dtype="float32", max_model_len=1024, tensor_parallel_size=ranks, engine=ENGINE
    )  # fmt: skip
    engine = VllmEngine(spec, model, executor="mp")
    try:
        counts.engine_class = (await engine.start()).engine_class
        digests = {0: ""}
        for number in range(1, SLOTS + 1):
            made = adapters.folder(number)
            digests[number] = made.name
            await engine.load_adapter(made.name, str(made))
        rows = Rows(engine, counts)
        for _ in range(BATCHES):
            order = [*range(SLOTS + 1), 0]
            rng.shuffle(order)
            batch = [_row(adapters, number, digests[number], rng) for number in order]
            counts.rows += len(batch)
            counts.differ += _differences(batch, await rows.run(batch))
            for cut in CUTS:
                counts.resumed += len(batch)
                counts.resumed_differ += _differences(batch, await rows.run(batch, cut))
    finally:
        await engine.close()
    return counts


def _row(adapters: MergedAdapters, number: int, digest: str, rng: random.Random) -> BatchRow:
    prompt = tuple(rng.randrange(TOKEN_LO, TOKEN_HI) for _ in range(PROMPT_TOKENS))
    return BatchRow(digest, prompt, adapters.merged_tokens(number, prompt, ANSWER_TOKENS))


def _differences(batch: Sequence[BatchRow], found: Sequence[tuple[int, ...]]) -> int:
    return sum(row.expected != tokens for row, tokens in zip(batch, found, strict=True))


def main(model: Path, folder: Path, ranks: int, out: Path) -> None:
    """Compute all batches and write the counts of rows."""
    folder.mkdir(parents=True, exist_ok=True)
    counts = asyncio.run(count(model, folder, ranks))
    part = out.with_suffix(".part")
    part.write_text(json.dumps(asdict(counts)))
    part.rename(out)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]))
