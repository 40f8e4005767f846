"""Recorded workloads: arrival times and lengths from public traces. The traces lie in a folder next to the checkout."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

DEFAULT_FOLDER = Path(__file__).resolve().parent.parent.parent / "shared" / "traces"


class NoData(ValueError):
    """Raised for a missing trace or dataset, or an unknown name. The message says what to do."""


@dataclass(frozen=True, slots=True)
class Traced:
    """A request of a trace: time, lengths, tenant, and the prompt's blocks of 512 tokens."""

    at_s: float
    prompt_tokens: int
    output_tokens: int
    tenant: str = ""
    blocks: tuple[int, ...] = ()


def _azure(path: Path) -> list[Traced]:
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    times = [datetime.fromisoformat(row["TIMESTAMP"][:26]).timestamp() for row in rows]
    return [
        Traced(at - times[0], int(row["ContextTokens"]), int(row["GeneratedTokens"]))
        for at, row in zip(times, rows, strict=True)
    ]


def _mooncake(path: Path) -> list[Traced]:
    with path.open() as file:
        rows = [json.loads(line) for line in file]
    return [
        Traced(r["timestamp"] / 1000, r["input_length"], r["output_length"], blocks=tuple(r["hash_ids"])) for r in rows
    ]


def _vtc(path: Path) -> list[Traced]:
    with path.open(newline="") as file:
        return [
            Traced(float(r["req_time_s"]), int(r["prompt_len"]), int(r["output_len"]), tenant=f"client-{r['client']}")
            for r in csv.DictReader(file)
        ]


TRACES: Mapping[str, tuple[str, Callable[[Path], list[Traced]]]] = {
    "azure-code": ("azure/AzureLLMInferenceTrace_code.csv", _azure),
    "azure-conv": ("azure/AzureLLMInferenceTrace_conv.csv", _azure),
    "mooncake": ("mooncake/conversation_trace.jsonl", _mooncake),
    "vtc": ("vtc/vtc_real_trace.csv", _vtc),
}


def load(name: str, folder: Path = DEFAULT_FOLDER) -> list[Traced]:
    """Return a trace in order of arrival. Raises NoData for an unknown name or an absent folder."""
    if name not in TRACES:
        raise NoData(f"unknown trace {name!r}: there are {', '.join(TRACES)}")
    file, read = TRACES[name]
    return sorted(read(data_file(folder, file)), key=lambda request: request.at_s)


def data_file(folder: Path, file: str) -> Path:
    """Return the path of a file in the folder of traces. Raises NoData if the file is absent."""
    if not folder.is_dir():
        raise NoData(f"the folder of traces is absent ({folder}): name another with --traces, or use another dataset")
    if not (path := folder / file).is_file():
        raise NoData(f"{folder} has no {file}: name a whole folder of traces with --traces")
    return path
