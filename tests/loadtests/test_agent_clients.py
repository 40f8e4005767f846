"""Tests of the part `clients` of the load test `agents`: the tasks, the judgement of a run, and the engine, which
answers from scripts and can die in a turn."""

from __future__ import annotations

import json
import shlex
import subprocess
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.api.types import EngineRequest, Sampling
from cluster.gateway.text.chat.template import ChatTemplate
from loadtests.agents import clients, prepare
from loadtests.agents.cases import Call
from loadtests.agents.client_tasks import coding
from loadtests.agents.client_tasks.engine import PacedEngine, TurnScripts
from loadtests.agents.client_tasks.tasks import (
    DEATHS,
    FAMILY,
    SIDE,
    TOOLS,
    TURNS,
    Submitted,
    Task,
    function_task,
    judge_calls,
    judge_requests,
    key_of_prompt,
)
from loadtests.agents.families import TEMPLATES
from loadtests.children import ROOT

TEMPLATE = ChatTemplate({"default": (TEMPLATES / "qwen3-training.jinja").read_text()})
TASK = function_task("made")
TASKS = [TASK, *(coding.coding_task(agent.name, agent.tools, Path("/work")) for agent in coding.CODING_AGENTS)]
PROGRAMS = ROOT / "loadtests" / "agents" / "client_programs"


def history(task: Task, turn: int, extra: Sequence[str] = (), *, reasons: bool = True) -> str:
    """Return the prompt of a turn as a client sends it, with `extra` messages of user and assistant before the task.
    `reasons`: whether the client sends reasoning back."""
    messages: list[dict[str, Any]] = [{"role": "system", "content": "You use <tool_call> and tools."}]
    messages += [{"role": ("user", "assistant")[at % 2], "content": text} for at, text in enumerate(extra)]
    messages.append({"role": "user", "content": f"{task.mark} Begin."})
    results = list(task.results)
    for step in task.steps[: turn - 1]:
        calls = [
            {"type": "function", "function": {"name": call.name, "arguments": call.arguments}} for call in step.calls
        ]
        reasoning = {"reasoning_content": step.reasoning} if reasons else {}
        messages.append({"role": "assistant", "content": step.text, "tool_calls": calls, **reasoning})
        messages += [{"role": "tool", "content": results.pop(0) if results else "done"} for _ in step.calls]
    return TEMPLATE.render(messages, tools=[{"type": "function", "function": tool} for tool in TOOLS])


RUN = [Submitted(f"{TASK.name}#{turn}", history(TASK, turn), 0) for turn in range(1, TURNS + 2)]
"""Requests of a run in which all is right."""


# -- tasks


@given(st.sampled_from(TASKS), st.integers(1, TURNS + 1), st.lists(st.sampled_from(("Hi", "<b>")), max_size=3))
def test_a_prompt_names_its_turn(task: Task, turn: int, extra: Sequence[str]) -> None:
    """The turn to which a prompt belongs is recognized by the number of earlier answers with tool calls. Messages that
    the client has put before the task make no difference."""
    prompt = history(task, turn, extra)
    assert key_of_prompt(prompt) == f"{task.name}#{turn}"
    assert f"{task.name}#{turn}" in task.answers
    assert key_of_prompt(prompt.replace("<tools>", "")) == SIDE
    assert key_of_prompt(prompt.replace(task.mark, "")) == SIDE


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_every_death_cuts_the_part_that_it_names(task: Task) -> None:
    """Each task kills a worker three times: once in the arguments of a turn's last tool call, once in the text of an
    answer and once in the reasoning. At the kill, a part of these arguments, this text or this reasoning was emitted,
    and the rest was not."""
    assert task.deaths.keys() == {f"{task.name}#{turn}" for turn in DEATHS}
    for turn, part in DEATHS.items():
        step, key = task.steps[turn - 1], f"{task.name}#{turn}"
        whole, end = step.written, task.deaths[key]
        cut = whole[:end]
        if part == "arguments":
            assert cut.count('"arguments": {') == len(step.calls)
            assert whole[end:].rstrip().endswith("</tool_call>")
            assert cut.count("</tool_call>") == len(step.calls) - 1
        else:
            piece = step.text if part == "text" else step.reasoning
            assert 0 < end - whole.index(piece) < len(piece)


def test_a_task_has_turns_with_two_calls_and_every_call_once() -> None:
    """The task has twelve turns with tool calls. Some turns have two calls, and no call occurs twice."""
    assert len(TASK.steps) == TURNS
    assert {len(step.calls) for step in TASK.steps} == {1, 2}
    assert len(TASK.results) == len(TASK.calls) == len({json.dumps([c.name, c.arguments]) for c in TASK.calls})


# -- the engine


class Killed(BaseException):
    """Raised where a real worker would be killed."""


def _kill() -> None:
    raise Killed


@pytest.fixture(scope="module")
def scripts(tmp_path_factory: pytest.TempPathFactory) -> TurnScripts:
    """Return the scripts of the task."""
    tokenizer = prepare.write_model(FAMILY, tmp_path_factory.mktemp("clients"), 65_536)
    return TurnScripts(tokenizer, prepare.script_ids(tokenizer, TASK.answers))


async def test_the_engine_dies_once_and_the_next_one_completes_the_answer(scripts: TurnScripts, tmp_path: Path) -> None:
    """An engine is killed shortly before it sends token 40 of an answer. A second engine gets the tokens that were sent
    so far, and completes the answer. The log has the requests to both engines."""
    key, log = f"{TASK.name}#4", tmp_path / "log"
    answer, due = scripts.answers[key], 40
    prompt = scripts.tokenizer.encode(history(TASK, 4)).ids
    sent: list[int] = []

    async def generate() -> None:
        engine = PacedEngine(scripts, log=log, folder=tmp_path, deaths={key: due}, kill=_kill, max_model_len=65_536)
        await engine.submit(EngineRequest("r", prompt, Sampling(9999), tuple(sent)))
        while True:
            (output,) = await engine.step()
            sent.extend(output.token_ids)
            if output.finish is not None:
                return

    with pytest.raises(Killed):
        await generate()
    assert due - 5 <= len(sent) < due
    cut = len(sent)
    await generate()
    assert sent == list(answer)
    assert [json.loads(line)["emitted"] for line in log.read_text().splitlines()] == [0, cut]
    assert {json.loads(line)["key"] for line in log.read_text().splitlines()} == {key}


# -- the runs


def test_a_client_gets_no_variable_of_this_process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A client's environment has only the variables of its run, and not, for example, the key of another server. The
    client runs in its own folder."""
    monkeypatch.setenv("OPENAI_API_KEY", "of another server")
    run = clients.Run(
        "made", "chat", True, "1", TASK, ["bash", "-c", "env; pwd"], {"ONE": "1", "HOME": "/home"}, tmp_path
    )
    lines = subprocess.run(clients.program(run), check=True, capture_output=True, text=True).stdout.splitlines()
    given = dict(line.split("=", 1) for line in lines[:-1])
    assert given.keys() - {"PWD", "SHLVL", "_"} == {"PATH", "LANG", "HOME", "PYTHONPATH", "ONE"}
    assert (given["HOME"], lines[-1]) == ("/home", str(tmp_path))


# -- the judgement


def test_a_run_as_in_the_script_has_no_faults() -> None:
    """No fault is reported for a run in which each turn was requested once and one answer was resumed. The resumed
    answer is counted."""
    resumed = replace(RUN[3], emitted=17)
    counts, wrong = judge_requests(TASK, [*RUN, resumed, Submitted(SIDE, "a title, please", 0)])
    assert wrong == []
    assert (counts.turns, counts.repeated, counts.side, counts.resumed) == (TURNS + 1, 0, 1, 1)


@given(st.integers(0, TURNS))
def test_a_turn_that_is_missing_or_repeated_is_seen(at: int) -> None:
    """A turn that a client leaves out is reported as a fault. A turn that a client requests twice is counted as
    repeated, and is not a fault."""
    assert judge_requests(TASK, RUN[:at] + RUN[at + 1 :])[1] == [f"turn {TASK.name}#{at + 1} was not asked for"]
    counts, wrong = judge_requests(TASK, [*RUN, RUN[at]])
    assert (counts.repeated, wrong) == (1, [])


_PARTS = [*TASK.results, *(each for step in TASK.steps for each in (step.text.strip(), step.reasoning) if each)]


@pytest.mark.slow
@given(st.sampled_from(_PARTS), st.sampled_from(("", "twice", "cut")))
def test_a_history_that_lost_or_doubled_something_is_seen(part: str, how: str) -> None:
    """A text or a tool result that is missing, doubled or cut in the last prompt is a fault. A reasoning may be
    missing, but not doubled or cut."""
    without = replace(RUN[-1], prompt=history(TASK, TURNS + 1, reasons=False))
    assert judge_requests(TASK, [*RUN[:-1], without])[1] == []
    prompt = RUN[-1].prompt
    assert prompt.count(part) == 1
    damaged = prompt.replace(part, {"": "", "twice": part + part, "cut": part[:-1]}[how])
    wrong = judge_requests(TASK, [*RUN[:-1], replace(RUN[-1], prompt=damaged)])[1]
    is_left_out = how == "" and part in {step.reasoning for step in TASK.steps}
    assert bool(wrong) != is_left_out


@given(st.permutations(TASK.calls), st.integers(0, len(TASK.calls) - 1))
def test_calls_are_judged_as_a_multiset(made: list[Call], at: int) -> None:
    """Calls may be made in any order. A call that is missing, doubled or has other arguments is a fault."""
    assert judge_calls(TASK.calls, made) == (len(made), [])
    assert judge_calls(TASK.calls, made[:at] + made[at + 1 :])[0] == len(made) - 1
    assert len(judge_calls(TASK.calls, [*made, made[at]])[1]) == 1
    other = Call(made[at].name, {**made[at].arguments, "more": 1})
    assert len(judge_calls(TASK.calls, [*made[:at], other, *made[at + 1 :]])[1]) == 2


def _do(call: Call, folder: Path) -> None:
    """Carry out a tool call as a coding agent would."""
    values = list(call.arguments.values())
    if "command" in call.arguments:
        subprocess.run(["bash", "-c", f"cd {shlex.quote(str(folder))}; {call.arguments['command']}"], check=True)
    elif "edits" in call.arguments or len(values) == 3:
        edit = call.arguments["edits"][0].values() if "edits" in call.arguments else values[1:]
        path, (old, new) = Path(values[0]), edit
        path.write_text(path.read_text().replace(old, new))
    elif len(values) == 2:
        Path(values[0]).write_text(values[1])


@pytest.mark.parametrize("agent", coding.CODING_AGENTS, ids=lambda agent: agent.name)
def test_the_files_show_whether_each_call_was_made_once(agent: coding.CodingAgent, tmp_path: Path) -> None:
    """If the agent makes each call of the script once, no fault is reported. A call that is made twice and a missing
    file are each reported as a fault."""
    task = coding.coding_task(agent.name, agent.tools, tmp_path)
    for call in task.calls:
        _do(call, tmp_path)
    assert coding.judge_files(tmp_path) == []
    _do(task.calls[0], tmp_path)
    assert len(coding.judge_files(tmp_path)) == 1
    (tmp_path / "notes.md").unlink()
    assert len(coding.judge_files(tmp_path)) == 2


def test_only_calls_with_success_count_as_answered() -> None:
    """Calls that did not end with success, on any API, are counted in a separate row."""
    samples = [
        ("headrace_requests_total", {"api": api, "outcome": outcome, "tenant": tenant}, 2.0)
        for api, outcome in (("openai", "ok"), ("anthropic", "ok"), ("anthropic", "cancelled"), ("openai", "timed_out"))
        for tenant in ("one", "other")
    ]
    outcomes = clients.calls_by_outcome([*samples, ("headrace_resumes_total", {"reason": "lost"}, 3.0)])
    assert outcomes == {"openai ok": 4, "anthropic ok": 4, "anthropic cancelled": 4, "openai timed_out": 4}
    (row,) = (row for row in clients.figures([], outcomes) if row.name == clients.REFUSED)
    assert (row.value, row.met) == (8, False)


# -- the packages


def test_the_packages_are_pinned_without_the_name_of_a_registry() -> None:
    """The npm packages have exact versions and hashes and no addresses; the PyPI packages have hashes."""
    package = json.loads((PROGRAMS / "package.json").read_text())
    lock = json.loads((PROGRAMS / "package-lock.json").read_text())["packages"]
    assert lock[""]["dependencies"] == package["dependencies"]
    for name, version in package["dependencies"].items():
        assert lock[f"node_modules/{name}"]["version"] == version
    installed = [entry for path, entry in lock.items() if path]
    assert all("integrity" in entry and "resolved" not in entry for entry in installed)
    assert "--hash=" in (ROOT / "requirements" / "clients.txt").read_text()


def test_the_docs_name_the_pinned_versions_of_all_clients() -> None:
    """docs/api.md has a row for each client, with the version that is installed for the scenario."""
    rows = [line for line in (ROOT / "docs" / "api.md").read_text().splitlines() if line.startswith("|")]
    pins = dict(json.loads((PROGRAMS / "package.json").read_text())["dependencies"])
    for line in (ROOT / "requirements" / "clients.in").read_text().splitlines():
        if not line.startswith("#"):
            name, _, version = line.partition("==")
            pins[name.partition("[")[0]] = version
    packages = {one.package for one in (*clients.LIBRARIES, *coding.CODING_AGENTS)}
    for package in packages:
        assert any(f"`{package}` {pins[package]} " in row for row in rows), package
