"""Tools that compare the cost of front ends: CPU clocks, prepared bodies, and the scripted executor's requests."""

from __future__ import annotations

import os
import subprocess
import sys
import time

from hypothesis import given
from hypothesis import strategies as st

from loadtests.agents.bodies import PreparedBodies
from loadtests.agents.scripted import ScheduledRequest
from loadtests.cpu_clocks import FrontEndClocks, process_cpu_s, used_between
from loadtests.faces.base import Request
from loadtests.faces.openai_sse import _delta_text
from tests.support.cpu import slowness


def test_a_process_is_measured_to_its_last_nanosecond() -> None:
    """The CPU time read for another process is at least that process's own count, and less than 10 ms above it. On a
    slow machine the bound is larger."""
    program = "import time; sum(range(10**6)); print(time.process_time(), flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", program], stdin=-1, stdout=-1, text=True) as child:
        assert child.stdout is not None
        own_s = float(child.stdout.readline())
        assert own_s <= process_cpu_s(child.pid) < own_s + 0.01 * slowness()
        child.communicate("\n")


def test_clocks_count_all_descendants_and_keep_what_ended() -> None:
    """The CPU time of a child counts, and stays counted when the child has ended."""
    clocks = FrontEndClocks([(os.getpid(), "driver")])
    before = clocks.read()
    program = (
        "import time\nend = time.process_time() + 0.05\nwhile time.process_time() < end: pass\nprint(flush=True)\n"
    )
    with subprocess.Popen([sys.executable, "-c", program + "input()"], stdin=-1, stdout=-1, text=True) as child:
        assert child.stdout is not None
        child.stdout.readline()
        clocks.find_processes()
        during = sum(used_between(before, clocks.read()).values())
        child.communicate("\n")
    after = sum(used_between(before, clocks.read()).values())
    assert during >= 0.05
    assert after >= during
    assert time.process_time() > 0


def test_bodies_are_sent_as_they_are() -> None:
    """A request is sent with exactly the bytes that were prepared for its key."""
    bodies = {"a": b'{"model":"m"}'}
    assert PreparedBodies("http://127.0.0.1:1", bodies).body(Request("a", "", 1)) is bodies["a"]


def test_the_text_of_a_delta_has_its_calls() -> None:
    """The text of a delta is its content, then the names and arguments of its tool calls."""
    calls = [{"function": {"name": "f", "arguments": ""}}, {"index": 1, "function": {"arguments": "{}"}}]
    assert _delta_text({"content": "x", "tool_calls": calls}) == "xf{}"
    assert _delta_text({"role": "assistant", "content": None}) == ""


@given(st.integers(1, 50), st.lists(st.integers(1, 20), min_size=1))
def test_no_token_comes_before_the_prompt_is_computed(prompt: int, steps: list[int]) -> None:
    """A step that leaves part of the prompt uncomputed has no token. Each later step has the next token."""
    request, computed, got = ScheduledRequest(prompt, iter(range(1000))), 0, []
    for scheduled in steps:
        made = request.tokens(scheduled)
        computed += scheduled
        assert bool(made) == (computed >= prompt)
        got += made
    assert got == list(range(len(got)))
