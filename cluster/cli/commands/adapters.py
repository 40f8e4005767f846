"""Commands for adapters (LoRA): check the files of one against a base model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cluster.cli.common import USAGE, JsonOption, fail, out, print_json

app = typer.Typer(no_args_is_help=True, help="Adapters (LoRA) of the models.")
FolderArgument = Annotated[
    Path, typer.Argument(help="The adapter's folder, with adapter_config.json.", file_okay=False, show_default=False)
]
ModelOption = Annotated[
    Path, typer.Option("--model", help="The base model's folder.", file_okay=False, show_default=False)
]
RankOption = Annotated[int, typer.Option("--max-lora-rank", help="The engine's max_lora_rank.", min=1, max=512)]


@app.command("check")
def check(
    folder: FolderArgument, model: ModelOption, max_lora_rank: RankOption = 64, as_json: JsonOption = False
) -> None:
    """Check an adapter's files against its base model, as a worker does before it loads them, and print the digest."""
    from cluster.worker.weights.adapter import AdapterError, base_shapes, check_adapter

    try:
        checked = check_adapter(folder, base_shapes(model), max_lora_rank)
    except AdapterError as error:
        fail(str(error), USAGE)
    if as_json:
        print_json(
            {
                "digest": checked.digest,
                "rank": checked.rank,
                "layers": checked.modules,
                "size_bytes": checked.size_bytes,
            }
        )
        return
    out.print(
        f"{folder}: valid; rank {checked.rank}, {checked.modules} layers, {checked.size_bytes} bytes, digest\n"
        f"{checked.digest}",
        markup=False,
        soft_wrap=True,
    )
