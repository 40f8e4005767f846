"""Without a terminal, the command `top` prints all views once. On a terminal, it is interactive."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import Result

from tests.support.overviews import overview
from tests.support.scripted_gateway import ScriptedGateway

Run = Callable[..., Result]
ROOT = Path(__file__).parents[4]


def test_json_is_the_document(run: Run, gateway: ScriptedGateway) -> None:
    """`top --json` prints the gateway's overview document once, including the calls."""
    gateway.script.overview = json.dumps(overview()).encode()
    done = run("top", "--json", "--admin", gateway.endpoint)
    assert (done.exit_code, json.loads(done.stdout)) == (0, overview())
    (request,) = gateway.script.requests
    assert request.with_calls


def test_without_a_terminal_one_picture_is_printed(run: Run, gateway: ScriptedGateway) -> None:
    """Without a terminal, `top` prints all views once, one below the other, and ends."""
    gateway.script.overview = json.dumps(overview()).encode()
    done = run("top", "--admin", gateway.endpoint)
    assert done.exit_code == 0, done.output
    for text in (
        "demo",
        "sim-w2",
        "chatcmpl-4",
        "tenant-1",
        "the queue is longer than 2 s",
        "downloading weights 40 %",
    ):
        assert text in done.stdout


def test_errors(run: Run, gateway: ScriptedGateway) -> None:
    """Exit codes: 3 for an unreachable gateway, 2 for an invalid interval, 1 for an answer that is no overview."""
    assert run("top", "--admin", "127.0.0.1:1").exit_code == 3
    assert run("top", "--interval", "0", "--admin", gateway.endpoint).exit_code == 2
    gateway.script.overview = b"[1]"
    done = run("top", "--admin", gateway.endpoint)
    assert (done.exit_code, "is no overview" in done.stderr) == (1, True)


class Terminal:
    """A command that runs on a pseudo-terminal of 80 columns and 24 lines."""

    def __init__(self, *arguments: str) -> None:
        self.master, self.slave = pty.openpty()
        fcntl.ioctl(self.slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
        self.before = termios.tcgetattr(self.slave)
        environment = os.environ | {"TERM": "xterm", "PYTHONPATH": str(ROOT), "COLUMNS": "80", "LINES": "24"}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "cluster.cli.main", *arguments],
            stdin=self.slave, stdout=self.slave, stderr=self.slave, env=environment, start_new_session=True,
        )  # fmt: skip
        self.text = ""

    def until(self, wanted: str) -> None:
        """Read the output until `wanted` has appeared."""
        deadline = time.monotonic() + 60
        start = len(self.text)
        while wanted not in self.text[start:]:
            assert time.monotonic() < deadline, f"{wanted!r} was not shown: {self.text[-2000:]!r}"
            self.text += os.read(self.master, 65536).decode(errors="replace")

    def press(self, keys: str) -> None:
        """Type keys on the terminal."""
        os.write(self.master, keys.encode())

    def close(self) -> None:
        """Kill the command if it still runs."""
        self.process.kill()
        self.process.wait(60)
        os.close(self.master)
        os.close(self.slave)


@pytest.mark.slow
def test_keys_on_a_terminal(gateway: ScriptedGateway) -> None:
    """Keys change the view, the screen is refreshed, and an unreachable gateway is shown.

    At the end the terminal has its earlier settings.
    """
    gateway.script.overview = json.dumps(overview()).encode()
    terminal = Terminal("top", "--interval", "0.2", "--admin", gateway.endpoint)
    try:
        terminal.until("q quit")
        terminal.press("2")
        terminal.until("sim-w1")
        terminal.press("\t")
        terminal.until("chatcmpl-0")
        gateway.script.overview = json.dumps(overview() | {"cluster": "renamed"}).encode()
        terminal.until("renamed")
        gateway.stop()
        terminal.until("no answer for")
        terminal.press("?")
        terminal.until("reverse the order")
        terminal.press("xq")
        assert terminal.process.wait(60) == 0
        assert termios.tcgetattr(terminal.slave) == terminal.before
    finally:
        terminal.close()
