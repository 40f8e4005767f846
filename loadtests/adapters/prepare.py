"""Program that writes a tiny base model, its bundle and adapters: python -m loadtests.adapters.prepare FOLDER COUNT

The program writes FOLDER/model, FOLDER/bundle and FOLDER/adapters/a0, a1, ... of rank 8, then FOLDER/ready.
"""

from __future__ import annotations

import sys
from pathlib import Path

from loadtests.serving import prepare
from tests.support.adapters import write_adapter

RANK = 8


def main(folder: Path, count: int) -> None:
    """Write the model, the bundle and `count` adapters to `folder`. The adapters' weights are small, so that the model
    emits ordinary text with any of them."""
    prepare.main("llama", folder)
    for number in range(count):
        write_adapter(folder / "adapters" / f"a{number}", folder / "model", RANK, number, spread=0.01)
    (folder / "ready").write_text("")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
