"""The last hour of a gateway process in memory: one value of each series every STEP_S, by model and by tenant.

Problem: the console plots an hour without Prometheus, in bounded memory, and the values of several gateways must be
added.

Method: a table keeps its values in arrays of float32, which are allocated for BLOCK keys at a time and never copied.
The value of a step is stored at the index (number of the step) modulo STEPS. For times to first token, the counts of a
histogram are kept instead of percentiles, since the counts of several gateways can be added. A missing value is NaN in
an array, and null in an answer.

Invariants: at most MAX_MODELS models and MAX_TENANTS tenants have series. When one more is added, the model or tenant
whose last value is the oldest is forgotten. The arrays of 1,000 tenants and 100 models take 30 MiB (test_history.py
measures them with tracemalloc): 7 numbers a tenant and 32 a model, for 720 steps of 5 s.

Units: `tokens` and `requests` in 1/s, `streams` as a number of calls, `queue` as a number of a tenant's calls or of a
model's sequences, `cost` per hour in the currency of the configuration, `cache_hits` as a fraction of the prompt
tokens, `fairness_gap` in units of docs/tenancy.md, `ttft_p50` and `ttft_p99` in seconds, `replicas_wanted` and
`replicas_had` as numbers.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Final

import numpy as np
import numpy.typing as npt

from cluster.gateway.apis.slices import in_slices
from cluster.gateway.console.overview.parts import STEP_S
from cluster.observe.definitions import TTFT_BUCKETS

Values = npt.NDArray[np.float32]

STEPS: Final = 720
"""Number of steps that are kept, one hour."""
MAX_MODELS: Final = 100
MAX_TENANTS: Final = 1000
BLOCK: Final = 16
"""Number of keys (models or tenants) whose arrays are allocated together."""
BUCKETS: Final = len(TTFT_BUCKETS) + 1
COUNTS: Final = tuple(f"ttft_{at}" for at in range(BUCKETS))
TENANT_COLUMNS: Final = ("tokens", "requests", "streams", "queue", "cost", "prompt", "cached")
MODEL_COLUMNS: Final = ("tokens", "streams", "queue", "cost", "prompt", "cached", "gap", "wanted", "had", *COUNTS)
LARGEST: Final = ("gap", "wanted", "had")
"""Columns that are merged by their maximum instead of their sum, because every gateway reports the same number."""

PERCENTILES: Final[Mapping[str, float]] = {"ttft_p50": 0.5, "ttft_p99": 0.99}
SERIES: Final[Mapping[str, tuple[str, ...]]] = {
    "tokens": ("tokens",),
    "requests": ("requests",),
    "streams": ("streams",),
    "queue": ("queue",),
    "cost": ("cost",),
    "cache_hits": ("cached", "prompt"),
    "fairness_gap": ("gap",),
    "replicas_wanted": ("wanted",),
    "replicas_had": ("had",),
    "ttft_p50": COUNTS,
    "ttft_p99": COUNTS,
}
"""The columns from which each series is computed."""


class Table:
    """Values of several models or tenants in the last STEPS steps, by the key of the model or tenant. For each key and
    step, there is one value in each column."""

    def __init__(self, columns: Sequence[str], max_keys: int) -> None:
        self.columns = {name: at for at, name in enumerate(columns)}
        self._max_keys = max_keys
        self._blocks: list[Values] = []
        self._rows: dict[str, int] = {}
        self._last: dict[str, int] = {}
        """The step of the last value of each key."""
        self._free: list[int] = []

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def nbytes(self) -> int:
        """Size of the arrays in bytes."""
        return sum(block.nbytes for block in self._blocks)

    def put(self, key: str, step: int, values: Sequence[float]) -> None:
        """Set the values of a key at a step, in the order of the columns. If the key already has values of a later
        step, the new values are ignored."""
        row = self._rows.get(key)
        if row is None:
            row = self._add(key, step)
        last = self._last[key]
        if step < last:
            return
        array = self._blocks[row // BLOCK][row % BLOCK]
        if step - last > 1:
            skipped = np.arange(max(last + 1, step - STEPS + 1), step) % STEPS
            array[:, skipped] = np.nan
        array[:, step % STEPS] = values
        self._last[key] = step

    def forget_older(self, step: int) -> None:
        """Forget each key that has no value within the hour before `step`."""
        for key in [key for key, last in self._last.items() if step - last >= STEPS]:
            self._drop(key)

    def _add(self, key: str, step: int) -> int:
        if len(self._rows) >= self._max_keys:
            self._drop(min(self._last, key=self._last.__getitem__))
        if not self._free:
            start = len(self._blocks) * BLOCK
            self._blocks.append(np.full((BLOCK, len(self.columns), STEPS), np.nan, np.float32))
            self._free = list(range(start + BLOCK - 1, start - 1, -1))
        row = self._rows[key] = self._free.pop()
        self._blocks[row // BLOCK][row % BLOCK].fill(np.nan)
        self._last[key] = step
        return row

    def _drop(self, key: str) -> None:
        self._free.append(self._rows.pop(key))
        del self._last[key]

    def read(self, key: str, columns: Sequence[str], first: int, last: int) -> Values:
        """Return the values of a key from step `first` to step `last`, both included: one row per column, one value per
        step."""
        out = np.full((len(columns), last - first + 1), np.nan, np.float32)
        row = self._rows.get(key)
        if row is None:
            return out
        until = min(last, self._last[key])
        begin = max(first, until - STEPS + 1, self._last[key] - STEPS + 1)
        if until < begin:
            return out
        at = [self.columns[name] for name in columns]
        steps = np.arange(begin, until + 1) % STEPS
        out[:, begin - first : until - first + 1] = self._blocks[row // BLOCK][row % BLOCK][at][:, steps]
        return out

    def sum_all(self, columns: Sequence[str], first: int, last: int, out: Values) -> Iterator[None]:
        """Write the sums over all keys into `out`. The caller has filled `out` with NaN, which counts as no value. The
        iterator yields None after each key, so that the caller can let other tasks run."""
        for key in list(self._rows):
            add(columns, out, self.read(key, columns, first, last))
            yield None


class History:
    """The history of one gateway process: a table of models and a table of tenants. Times are seconds since the
    epoch."""

    def __init__(self) -> None:
        self.models = Table(MODEL_COLUMNS, MAX_MODELS)
        self.tenants = Table(TENANT_COLUMNS, MAX_TENANTS)

    @property
    def nbytes(self) -> int:
        """Size of all arrays in bytes."""
        return self.models.nbytes + self.tenants.nbytes

    def forget_older(self, at_s: float) -> None:
        """Forget each model and tenant that has no value within the hour before the time `at_s`."""
        step = int(at_s // STEP_S)
        self.models.forget_older(step)
        self.tenants.forget_older(step)

    async def columns(
        self, names: Iterable[str], model: str, tenant: str, first: int, last: int
    ) -> dict[str, list[float]]:
        """Return columns by name, for one model or tenant, or for the cluster if both are "". Unknown values are NaN.
        For the cluster, the values of all models are added in slices, and other tasks run between the slices."""
        table = self.tenants if tenant else self.models
        needed = [name for name in dict.fromkeys(names) if name in table.columns]
        if tenant or model:
            values = table.read(tenant or model, needed, first, last)
        else:
            values = np.full((len(needed), last - first + 1), np.nan, np.float32)
            await in_slices(table.sum_all(needed, first, last, values))
        return {name: values[at].tolist() for at, name in enumerate(needed)}


def columns_of(series: Iterable[str]) -> list[str]:
    """Return the names of the columns that are needed to compute these series."""
    return list(dict.fromkeys(column for name in series for column in SERIES[name]))


def add(columns: Sequence[str], out: Values, values: Values) -> None:
    """Add `values` to `out`, column by column and step by step. In the columns LARGEST, the larger value is kept
    instead of the sum. If one of the two values is NaN, the other value is kept."""
    both = np.fmax(out, values)  # if one of two values is NaN, the other
    is_sum = np.array([name not in LARGEST for name in columns])[:, None] & ~np.isnan(out) & ~np.isnan(values)
    np.copyto(out, np.where(is_sum, out + values, both))


async def add_columns(parts: Sequence[Mapping[str, Sequence[float | None]]], steps: int) -> dict[str, Values]:
    """Return the columns of several gateways, merged by `add`. `parts`: the columns of each gateway, by name. Columns
    that do not have `steps` values are ignored."""
    out: dict[str, Values] = {}

    def add_each() -> Iterator[None]:
        for part in parts:
            for name, values in part.items():
                if len(values) == steps:
                    array = np.array(values, np.float32)[None, :]
                    known = out.setdefault(name, np.full((1, steps), np.nan, np.float32))
                    add([name], known, array)
                yield None

    await in_slices(add_each())
    return {name: values[0] for name, values in out.items()}


def compute(names: Sequence[str], columns: Mapping[str, Values], steps: int) -> dict[str, list[float | None]]:
    """Return the values of series, computed from their columns: one value per step, None if it is unknown."""
    return {name: _series(name, columns, steps) for name in names}


def _series(name: str, columns: Mapping[str, Values], steps: int) -> list[float | None]:
    needed = SERIES[name]
    if any(column not in columns for column in needed):
        return [None] * steps
    if name in PERCENTILES:
        values = quantiles(np.nan_to_num(np.stack([columns[column] for column in needed])), PERCENTILES[name])
    elif name == "cache_hits":
        cached, prompt = (columns[column] for column in needed)
        values = np.divide(cached, prompt, out=np.full(steps, np.nan, np.float32), where=prompt > 0)
    else:
        values = columns[needed[0]]
    return [round(value, 4) if value == value else None for value in values.tolist()]


def quantiles(counts: Values, part: float) -> Values:
    """Return a quantile of each step's histogram, computed as in overview.quantile; NaN for a step without counts.
    `counts`: one row per bucket, one column per step. `part`: which quantile, for example 0.99."""
    sums = np.cumsum(counts, axis=0, dtype=np.float64)
    total = sums[-1]
    rank = part * total
    at = np.argmax((sums >= rank) & (counts > 0), axis=0)
    steps = np.arange(counts.shape[1])
    bounds = np.array([0.0, *TTFT_BUCKETS, TTFT_BUCKETS[-1]])
    low, high, count = bounds[at], bounds[at + 1], counts[at, steps]
    with np.errstate(divide="ignore", invalid="ignore"):
        inside = np.maximum(rank - (sums[at, steps] - count), 0.0) / count
    return np.where(total > 0, low + (high - low) * inside, np.nan).astype(np.float32)
