"""Tests of arrivals, datasets and traces: equal seeds give equal values, lengths are as requested, and absent data
gives clear errors.
"""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest

from loadtests import arrivals, datasets, traces
from loadtests.traces import NoData, Traced


@pytest.mark.parametrize("cv", [0.5, 1.0, 4.0])
def test_gaps_have_the_rate_and_the_burstiness_asked_for(cv: float) -> None:
    """Rate and coefficient of variation of twenty thousand gaps are within 10 % of the requested values."""
    gaps = np.diff([0.0, *arrivals.gamma(20_000, 50.0, cv, seed=3)])
    assert gaps.mean() == pytest.approx(1 / 50, rel=0.1)
    assert gaps.std() / gaps.mean() == pytest.approx(cv, rel=0.1)


def test_equal_seeds_give_equal_workloads_and_others_differ() -> None:
    """Equal seeds give equal arrivals and prompts; other seeds give different arrivals and prompts."""
    assert arrivals.poisson(50, 10, 1) == arrivals.poisson(50, 10, 1) != arrivals.poisson(50, 10, 2)
    assert datasets.fixed(5, 20, 8, 1) == datasets.fixed(5, 20, 8, 1) != datasets.fixed(5, 20, 8, 2)


def test_a_replay_begins_at_once_and_keeps_its_proportions() -> None:
    """A replay begins at 0, and twice the speed halves every gap."""
    assert arrivals.replay([100.0, 101.0, 105.0], 2.0) == [0.0, 0.5, 2.5]


@pytest.mark.parametrize("wrong", [(0.0, 1.0), (-1.0, 1.0), (1.0, 0.0)])
def test_impossible_arrivals_are_refused(wrong: tuple[float, float]) -> None:
    """A rate of zero is refused, and so is a coefficient of variation of zero."""
    with pytest.raises(ValueError, match="must be above 0"):
        arrivals.gamma(3, *wrong, seed=1)


def test_members_of_a_group_share_its_prefix_and_others_do_not() -> None:
    """All prompts of a group begin with the same fifty words, and two groups have different first words."""
    requests = datasets.prefixes(30, 3, prefix_words=50, own_words=5, max_tokens=4, seed=1)
    heads = {request.group: set[str]() for request in requests}
    for request in requests:
        heads[request.group].add(" ".join(request.prompt.split()[:50]))
    assert len(heads) == 3
    assert all(len(heads_of_group) == 1 for heads_of_group in heads.values())
    assert len({" ".join(head.split()[:5]) for (head,) in heads.values()}) == 3


def test_equal_blocks_of_a_trace_are_equal_text() -> None:
    """Equal blocks of a trace give equal text, so a prefix cache has the same hits as in the traced system."""
    one, other = datasets.from_trace([Traced(0, 1024, 10, "", (7, 8)), Traced(1, 1024, 10, "", (7, 9))], 0.125, seed=1)
    assert one.prompt.split()[:64] == other.prompt.split()[:64]
    assert one.prompt.split()[64:] != other.prompt.split()[64:]
    assert len(one.prompt.split()) == 128


def test_traces_are_read_in_each_of_their_formats(tmp_path: Path) -> None:
    """Azure's CSV, Mooncake's JSON lines and VTC's CSV are read in order of arrival."""
    for name, lines in {
        "azure/AzureLLMInferenceTrace_conv.csv": "TIMESTAMP,ContextTokens,GeneratedTokens\n"
        "2023-11-16 18:15:46.6805900,374,44\n2023-11-16 18:15:50.9951690,396,109\n",
        "mooncake/conversation_trace.jsonl": json.dumps(
            {"timestamp": 2000, "input_length": 600, "output_length": 5, "hash_ids": [0, 3]}
        ),
        "vtc/vtc_real_trace.csv": "req_id,client,prompt_len,output_len,req_time_s\n1,2,36,137,0.5\n0,13,13,199,0.0\n",
    }.items():
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text(lines)
    azure = traces.load("azure-conv", tmp_path)
    assert [(t.prompt_tokens, t.output_tokens) for t in azure] == [(374, 44), (396, 109)]
    assert azure[1].at_s == pytest.approx(4.314579)
    assert traces.load("mooncake", tmp_path) == [Traced(2.0, 600, 5, "", (0, 3))]
    assert [t.tenant for t in traces.load("vtc", tmp_path)] == ["client-13", "client-2"]


@pytest.mark.parametrize("name", sorted(traces.TRACES))
def test_the_real_traces_can_be_read_whole(name: str) -> None:
    """Each trace in the folder of downloaded traces can be read completely, in order of arrival."""
    if not traces.DEFAULT_FOLDER.is_dir():
        pytest.skip("optional data: the folder of traces is absent")
    requests = traces.load(name)
    assert len(requests) > 1000
    assert all(a.at_s <= b.at_s for a, b in itertools.pairwise(requests))
    assert all(request.prompt_tokens > 0 for request in requests)


def test_mt_bench_gives_as_many_questions_as_asked(tmp_path: Path) -> None:
    """As many questions are returned as requested. If the dataset has fewer, they are repeated from the beginning, with
    different keys."""
    (tmp_path / "fastchat").mkdir()
    questions = [{"question_id": i, "category": "c", "turns": [f"question {i}", "more"]} for i in range(3)]
    (tmp_path / "fastchat/mt_bench_question.jsonl").write_text("\n".join(map(json.dumps, questions)))
    requests = datasets.mt_bench(7, 16, 1, tmp_path)
    assert len({request.key for request in requests}) == 7
    assert {request.prompt for request in requests} == {"question 0", "question 1", "question 2"}


def test_an_absent_folder_and_an_unknown_name_say_what_to_do(tmp_path: Path) -> None:
    """If the folder of traces is absent, the error names the option `--traces`. For an unknown trace or dataset, the
    error lists the known ones."""
    with pytest.raises(NoData, match=r"folder of traces is absent .*--traces"):
        traces.load("mooncake", tmp_path / "nowhere")
    with pytest.raises(NoData, match=r"unknown trace 'moon': there are azure-code"):
        traces.load("moon", tmp_path)
    with pytest.raises(NoData, match=r"unknown dataset 'sharegpt': there are fixed"):
        datasets.check_name("sharegpt")
