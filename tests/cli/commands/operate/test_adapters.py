"""The command `adapters check` reports whether a worker would load an adapter."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from typer.testing import Result

from cluster.worker.weights.adapter import adapter_digest
from tests.support.adapters import write_adapter
from tests.worker.weights.test_adapter import write_base

Run = Callable[..., Result]


def test_check_prints_the_digest_or_the_fault(run: Run, tmp_path: Path) -> None:
    """`adapters check` prints the digest of a good adapter and exits with 0.

    For a bad adapter it exits with 2, and the error names the file, the key and the remedy.
    """
    base = write_base(tmp_path / "base", 32)
    folder = write_adapter(tmp_path / "a", base)
    done = run("adapters", "check", str(folder), "--model", str(base))
    assert done.exit_code == 0, done.stderr
    assert adapter_digest(folder) in done.stdout
    done = run("adapters", "check", str(folder), "--model", str(base), "--json")
    assert json.loads(done.stdout)["layers"] == 14
    done = run("adapters", "check", str(folder), "--model", str(base), "--max-lora-rank", "4")
    assert done.exit_code == 2
    assert "adapter_config.json: r: 8 is above the engine's max_lora_rank 4; set engine.max_lora_rank" in " ".join(
        done.stderr.split()
    )
