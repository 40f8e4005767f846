"""headrace plan: which GPUs a model needs, and whether the models of a file fit on theirs."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from cluster.api.types import ModelSpec
from cluster.cli.common import FAILED, USAGE, JsonOption, fail, out, print_json
from cluster.policy.capacity import fit as fits
from cluster.policy.capacity.fit import Fit
from cluster.policy.capacity.gpus import GPU_GIB, Gpu, gpu, in_gib

if TYPE_CHECKING:
    from cluster.cli.model_sizes import ModelSize

DEFAULT_GPUS = ("L4", "A100", "H100", "H200", "B200")
DEFAULT_CONTEXT = 8192
"""Tokens of a call of a model without a greatest length."""
NODE_GPUS = 8
MOST_GPUS = 16
"""GPUs of a replica that are tried, unless --gpu names a number."""


@dataclass(frozen=True, slots=True)
class Planned:
    """A division of a model. `name`: name of the model in the file, with the version of a canary; empty for a model
    that was named directly. `alternative`: whether the division does not count in the sum of a file's GPUs, since it is
    of a canary or of a GPU type that is not the preferred one."""

    name: str
    size: ModelSize
    fit: Fit
    replicas: tuple[int, int]
    """Fewest and most replicas."""
    alternative: bool = False

    def as_json(self) -> dict[str, Any]:
        """Return the plan as --json prints it."""
        one = self.fit
        return {
            **({"model": self.name} if self.name else {}),
            "gpu": one.gpu.name,
            "tensor_parallel_size": one.engine.tp,
            "pipeline_parallel_size": one.engine.pp,
            "gpu_bytes": int(one.gpu.memory * one.engine.utilization),
            "weights_bytes": one.weights,
            "reserve_bytes": one.reserve,
            "kv_cache_bytes": max(0, one.room),
            "context": one.context,
            "calls": round(one.calls, 2),
            "lacking_bytes": one.lacking,
            "replicas": list(self.replicas),
            "gpus": [count * one.gpus for count in self.replicas],
        }


def plan(
    model_or_file: Annotated[
        str,
        typer.Argument(
            metavar="MODEL|FILE",
            help="A model's folder, its config.json, hf://organisation/name or a demo model; or a cluster.yaml or the "
            "chart's values.",
            show_default=False,
        ),
    ],
    on: Annotated[
        list[str] | None,
        typer.Option(
            "--gpu",
            help="GPU type, or a size such as 24GiB; H100x4: at most four GPUs a replica. May be repeated.",
            show_default=", ".join(DEFAULT_GPUS),
        ),
    ] = None,
    context: Annotated[
        int | None,
        typer.Option("--context", min=1, help="Tokens of a call.", show_default="max_model_len, or the model's length"),
    ] = None,
    concurrency: Annotated[int, typer.Option("--concurrency", min=1, help="Calls at once.")] = 1,
    as_json: JsonOption = False,
) -> None:
    """Show which GPUs a model needs, or whether a file's fit.

    The models of a file are planned on the GPU types of their entries. Weights and KV cache are calculated from the
    checkpoint; the memory of a step is estimated. Exit code 1 if a model does not fit."""
    from cluster.cli.model_sizes import model_size

    gpus = [_gpu(text) for text in on or ()]
    path = Path(model_or_file)
    try:
        if path.is_file() and path.suffix in (".yaml", ".yml"):
            planned = list(_of_file(path, gpus, context, concurrency))
            if not planned:
                fail(f"{path} has no model that can be planned", USAGE)
            chosen = planned
        else:
            spec = ModelSpec("model", model_or_file)
            size = model_size(spec)
            planned = list(_of_model(spec, size, gpus, context, concurrency))
            best = fits.best([one.fit for one in planned], concurrency)
            chosen = [one for one in planned if one.fit is best]
    except (ValueError, OSError) as error:
        fail(str(error), USAGE)
    if as_json:
        print_json({"models": _models(planned), "plans": [one.as_json() for one in planned]})
    else:
        _show(planned, chosen, concurrency)
    if not chosen or any(one.fit.calls < 1 for one in chosen):
        raise typer.Exit(FAILED)


def _gpu(text: str) -> tuple[Gpu, int]:
    """Return the GPU and the greatest number of GPUs of a replica. Ends the command for an unknown type."""
    name, number = re.fullmatch(r"(.*?)(?:x(\d{1,3}))?", text, re.IGNORECASE | re.DOTALL).groups()  # type: ignore[union-attr]
    found, count = gpu(name), int(number or MOST_GPUS)
    if found is None or count < 1:
        fail(f"--gpu {text}: unknown; take {', '.join(GPU_GIB)}, or a size such as 24GiB", USAGE)
    return found, count


def _of_model(
    spec: ModelSpec, size: ModelSize, gpus: Sequence[tuple[Gpu, int]], context: int | None, concurrency: int
) -> Iterator[Planned]:
    """Yield the divisions of a model: all that fit on the given GPUs, or the smallest on each of the usual ones."""
    from cluster.cli.model_sizes import engine_of

    tokens = context or spec.max_model_len or size.longest or DEFAULT_CONTEXT
    for kind, most in gpus or [(one, MOST_GPUS) for name in DEFAULT_GPUS if (one := gpu(name)) is not None]:
        last = None
        for tp, pp in fits.divisions(size.shape, most, NODE_GPUS):
            if last is not None and last.fit.calls >= 1 and (pp > 1 or not gpus):
                break  # stages are for what does not fit within a node
            division = fits.fit(size.shape, kind, replace(engine_of(spec), tp=tp, pp=pp), tokens)
            count = fits.replicas(division, concurrency) if division.calls >= 1 else 0
            last = Planned("", size, division, (count, count))
            if division.calls >= 1:
                yield last
        if last is not None and last.fit.calls < 1:
            yield last


def _of_file(path: Path, gpus: Sequence[tuple[Gpu, int]], context: int | None, concurrency: int) -> Iterator[Planned]:
    """Yield a plan for each version and GPU type of each model of a file. Raises ValueError."""
    from cluster.cli.commands.run.processes import source_rules
    from cluster.cli.config_inputs import NoConfiguration, read_input
    from cluster.cli.model_sizes import engine_of, model_size
    from cluster.config.document import without_invalid_keys

    try:
        given = read_input(path.read_text())
    except NoConfiguration as error:
        raise ValueError(f"{path}: {error}") from None
    config, wrong = without_invalid_keys(given.document)
    if config is None or wrong:
        raise ValueError(f"{path} has errors: see headrace config check {path}")
    for model in config.models:
        for at, spec in enumerate(model.specs()):
            if spec.source.startswith("sim://"):
                continue
            kind = gpu(spec.gpu) if spec.gpu else (gpus[0][0] if gpus else None)
            if kind is None:
                raise ValueError(
                    f"models[{spec.name}].gpu: {spec.gpu or 'any type'}: its memory is unknown; give --gpu"
                )
            size = model_size(spec, source_rules(config))
            one = fits.fit(
                size.shape, kind, engine_of(spec), context or spec.max_model_len or size.longest or DEFAULT_CONTEXT
            )
            canary = f" {spec.version}" if spec.version != model.version else ""
            yield Planned(spec.name + canary, size, one, (spec.min_replicas, spec.max_replicas), at > 0)


def _models(planned: Sequence[Planned]) -> list[dict[str, Any]]:
    sizes = {one.name: one.size for one in planned}
    return [
        {
            **({"model": name} if name else {}),
            "dtype": size.dtype,
            "weights_bytes": size.shape.weights,
            "weights_from": size.weights_from,
            "kv_bytes_per_token": size.shape.cache.token_bytes,
            "kv_bytes_per_window_token": size.shape.cache.window_bytes,
            "window": size.shape.cache.window,
            "state_bytes_per_call": size.shape.cache.state_layers * size.shape.cache.state_bytes,
            "max_length": size.longest,
        }
        for name, size in sizes.items()
    ]


def _show(planned: Sequence[Planned], chosen: Sequence[Planned], concurrency: int) -> None:
    for name, size in {one.name: one.size for one in planned}.items():
        cache = size.shape.cache
        window = f", {cache.window_bytes / 1024:g} KiB in a window of {cache.window}" if cache.window_bytes else ""
        state = f", {cache.state_layers * cache.state_bytes / 1024:g} KiB a call" if cache.state_layers else ""
        out.print(
            f"{name + ': ' if name else ''}{size.dtype}, weights {in_gib(size.shape.weights)} "
            f"(from {size.weights_from}), KV cache {cache.token_bytes / 1024:g} KiB a token{window}{state}",
            markup=False,
        )
    columns = ("model",) if any(one.name for one in planned) else ()
    table = Table(
        *columns, "gpu", "tp", "pp", "weights", "reserve", "KV cache", "tokens a call", "calls", "replicas", "GPUs",
        box=None, pad_edge=False,
    )  # fmt: skip
    for one in planned:
        division, (least, most) = one.fit, one.replicas
        counts = [f"{least}" if least == most else f"{least}-{most}"]
        counts += [f"{least * division.gpus}" if least == most else f"{least * division.gpus}-{most * division.gpus}"]
        if division.calls < 1:
            counts = [f"does not fit: lacks {in_gib(division.lacking)} a GPU", ""]
        table.add_row(
            *([one.name] if columns else []),
            division.gpu.name,
            str(division.engine.tp),
            str(division.engine.pp),
            in_gib(division.weights),
            in_gib(division.reserve),
            in_gib(max(0, division.room)),
            f"{division.context:,}",
            f"{division.calls:.1f}",
            *counts,
        )
    out.print(table)
    if columns:
        by_type: dict[str, int] = {}
        for one in (one for one in planned if not one.alternative):
            by_type[one.fit.gpu.name] = by_type.get(one.fit.gpu.name, 0) + one.replicas[0] * one.fit.gpus
        total = ", ".join(f"{count} {name}" for name, count in by_type.items())
        out.print(f"at replicas.min, on the preferred types: {total}", markup=False)
    elif chosen:
        division = chosen[0].fit
        plural = "" if concurrency == 1 else "s"
        out.print(
            f"fewest GPUs for {concurrency} call{plural} at once:\n"
            f"  gpu: {division.gpu.name}\n  tensor_parallel_size: {division.engine.tp}\n"
            f"  pipeline_parallel_size: {division.engine.pp}\n  max_model_len: {division.context}\n"
            f"  replicas: {{min: {chosen[0].replicas[0]}}}",
            markup=False,
        )
