"""Tests of `make gpu-report`.

A missing GPU, peer or model is reported. Engines share one GPU's memory if it is large enough. A trial on CPU never
reports that a bound is met.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from datetime import UTC, datetime
from pathlib import Path

import pytest

from loadtests import gpu_report
from loadtests.children import ROOT, Children
from loadtests.figures import Bound, missing, ratio_figure
from loadtests.markdown import TRIAL, Device, Subject, page
from loadtests.report import Report
from loadtests.scenarios.peers import RAY_PROXY
from loadtests.scenarios.relay import GRPC
from loadtests.serving import ours as serving
from tests.support.checkpoints import build_tokenizer

GIB = 1 << 30
CARD = Device("NVIDIA Example", 80 * GIB, 79 * GIB)


def report() -> Report:
    """Return a report with one measured row and one row that was not measured."""
    made = Report("gpu-report", started_at=datetime(2026, 1, 2, tzinfo=UTC))
    rows = [1.0, 1.1] * 5, [2.0, 2.1] * 5
    made.figures.append(ratio_figure("CPU | per token", *rows, Bound("<=", 0.6), scale=1e6, difference_unit="µs/token"))
    made.figures.append(missing("TTFT", Bound("<=", 1.0), "the peer did not run"))
    return made


def test_a_page_names_what_ran_where() -> None:
    """A report page on load tests with GPUs names the number of GPUs of each kind, the driver, the commit and the
    command. A measured row has its interval. A row without a value has the reason."""
    subject = Subject("org/model-8b", "LlamaForCausalLM", 16 * GIB, "bfloat16", "python -m x", [CARD, CARD], "NVIDIA 1")
    text = page(subject, [("One GPU", report()), ("Two", report())], ["A note."])
    assert text.startswith("# Load test on GPUs, 2026-01-02\n")
    assert "| GPU | 2 x NVIDIA Example, 80 GiB |" in text
    assert "| driver | NVIDIA 1 |" in text
    assert "| model | org/model-8b (LlamaForCausalLM, 16.00 GiB of weights) |" in text
    assert "python 3." in text
    assert "| CPU \\| per token | 0.512 | 0.5" in text
    assert "| <= 0.6 | yes | -1e+06 µs/token | 10 |  |" in text
    assert "| TTFT | not measured |  | <= 1 | - |  | 0 | the peer did not run |" in text
    assert text.index("A note.") < text.index("## One GPU") < text.index("## Two")
    assert TRIAL not in text


def test_a_trial_says_so_first() -> None:
    """The page of a trial begins with a note that it is a trial and not a measurement."""
    text = page(Subject("tiny", "X", 0, "float32", "c"), [("peers", report())])
    assert text.splitlines()[0] == "# Trial of the GPU load test, on CPU, 2026-01-02"
    assert text.splitlines()[2] == TRIAL
    assert "| GPU | none was used |" in text


def test_a_page_tells_each_problem_once_with_the_end_of_its_log() -> None:
    """If several servers fail for the same reason, the page names them together and shows the last lines of the log
    once."""
    made = report()
    for name in ("SMG", "LiteLLM"):
        made.arm(name, "").problem = "server ended; its log ends:\n" + "\n".join(f"line {i}" for i in range(20))
    text = page(Subject("m", "X", 0, "bfloat16", "c", [CARD]), [("One GPU", made)])
    assert "- SMG, LiteLLM: server ended; its log ends:\n\n  ```\n  line 8\n" in text
    assert text.count("line 19") == 1


def test_all_that_is_missing_is_said_at_once(tmp_path: Path) -> None:
    """A missing GPU, missing peers and a missing model are reported together, each with the remedy."""
    text = "\n".join(gpu_report.lacking([], tmp_path, ""))
    assert "no GPU: torch sees none here" in text
    assert "make bench-peers" in text
    assert "Hugging Face id" in text
    assert not [line for line in gpu_report.lacking([CARD], tmp_path, "m") if "GPU: torch" in line or "id of" in line]


def test_engines_share_the_memory_of_one_gpu() -> None:
    """Three engines share the GPU if they fit. Otherwise Ray Serve's engine is left out. Too little memory for two
    engines gives a clear error."""
    arms, share, notes = gpu_report.share_memory(CARD, 16 * GIB, gpu_report.ARMS)
    assert (RAY_PROXY in arms, share, notes) == (True, 0.3, [])
    assert 3 * share * CARD.total_bytes <= CARD.free_bytes
    arms, share, notes = gpu_report.share_memory(CARD, 30 * GIB, gpu_report.ARMS)
    assert (RAY_PROXY in arms, GRPC in arms, share) == (False, True, 0.45)
    assert notes == ["Ray Serve proxy was left out: a third engine does not fit."]
    with pytest.raises(gpu_report.Missing, match=r"79\.0 GiB free, and two engines of this model need 86\.0"):
        gpu_report.share_memory(CARD, 40 * GIB, gpu_report.ARMS)


def test_engines_have_one_set_of_settings() -> None:
    """All engines use bfloat16 and a context that is at most the model's. Ranks are set only if requested."""
    settings = gpu_report.engine_settings(0.3, 1024)
    assert (settings["dtype"], settings["max_model_len"]) == ("bfloat16", 1024)
    assert "tensor_parallel_size" not in settings
    assert gpu_report.engine_settings(0.3, 131072, 2)["tensor_parallel_size"] == 2


@pytest.mark.parametrize("model", ["nothing-here", "/nowhere/at/all", "a/b/c"])
def test_a_model_that_is_none_is_refused(model: str) -> None:
    """A model name that is neither a folder nor a Hugging Face id is refused."""
    with pytest.raises(gpu_report.Missing, match="neither a folder nor a Hugging Face id"):
        gpu_report.checkpoint(model)


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    """A folder without weights is refused, and the message names the missing file."""
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(gpu_report.Missing, match=r"holds no \*\.safetensors"):
        gpu_report.checkpoint(str(tmp_path))


@pytest.mark.long
async def test_a_real_checkpoint_is_served_without_its_sampling_defaults(tmp_path: Path) -> None:
    """The files of a real checkpoint are used in place, and decoding is greedy on every API."""
    there = build_tokenizer("llama", tmp_path / "there" / "real-model")
    config = {"model_type": "llama", "vocab_size": 768, "max_position_embeddings": 4096, "eos_token_id": 7}
    (there / "config.json").write_text(json.dumps(config))
    (there / "generation_config.json").write_text(json.dumps({"temperature": 0.6, "eos_token_id": 7}))
    async with Children(tmp_path / "logs") as children:
        model, bundle = await serving.prepare(children, str(there), tmp_path)
    assert (model / "tokenizer.json").samefile(there / "tokenizer.json")
    assert json.loads((model / "generation_config.json").read_text()) == {"eos_token_id": 7}
    assert json.loads((there / "generation_config.json").read_text())["temperature"] == 0.6
    assert any(bundle.iterdir())


HIDDEN = {"CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": ""}
"""Environment variables that hide all GPUs of this machine."""


async def _run(*arguments: str) -> tuple[int, str, str]:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "loadtests.gpu_report", *arguments, cwd=ROOT, env=os.environ | HIDDEN,
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    out, err = await process.communicate()
    return process.returncode or 0, out.decode(), err.decode()


@pytest.mark.slow
async def test_without_a_gpu_it_ends_with_what_is_missing(tmp_path: Path) -> None:
    """Without a GPU, the command ends with exit code 2 and prints neither a page nor a traceback."""
    code, out, err = await _run("org/model", "--out", str(tmp_path / "page.md"))
    assert code == 2
    assert "error: no GPU" in err
    assert "Traceback" not in out + err
    assert not (tmp_path / "page.md").exists()


@pytest.mark.engine
@pytest.mark.long
async def test_a_trial_on_cpu_runs_the_whole_way(tmp_path: Path) -> None:
    """The load test, run on CPUs as a trial, finishes one tiny round with the real engine and our gateway. If a server
    did not run, the rows that need this server say so. No row counts as met."""
    where = tmp_path / "deep" / "page.md"
    code, out, err = await _run(
        "--cpu", "--rounds", "1", "--concurrency", "2", "--tokens", "4", "--only", GRPC, "--out", str(where)
    )  # fmt: skip
    assert code == 0, out + err
    text = where.read_text()
    assert TRIAL in text
    assert "| GPU | none was used |" in text
    assert "vllm-router did not run" in text
    assert " yes |" not in text
    assert "\n| ours StreamChat | 1 | " in text
