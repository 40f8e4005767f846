"""The command `top`, which shows the cluster's current state in a terminal and refreshes it."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from typing import Annotated, Any

import grpc
import typer
from rich.live import Live

from cluster.cli.common import JsonOption, SafeConsole, fail, out, print_json
from cluster.cli.target.access import admin_access
from cluster.cli.target.admin_client import Admin, open_admin
from cluster.cli.target.contexts import ClusterTarget
from cluster.cli.target.target_options import with_admin_target
from cluster.cli.top.keys import TopState, keyboard, pressed
from cluster.cli.top.screen import Picture, plain_picture, screen
from cluster.client.errors import from_rpc

KEYS_S = 0.25
"""Longest time, in seconds, until a pressed key or a change of the terminal's size takes effect."""


@with_admin_target
def top(
    target: ClusterTarget,
    interval: Annotated[
        float, typer.Option("--interval", help="Seconds between two pictures.", min=0.2, max=3600.0)
    ] = 1.0,
    as_json: JsonOption = False,
) -> None:
    """Show models, workers, calls, tenants and scaling, live. Keys: 1 to 5 or tab choose a view, s sorts, / filters,
    ? shows all keys, q quits. Without a terminal, or with --json, it prints one picture and ends."""
    access = admin_access(target)
    with open_admin(access) as api:
        document = _overview(api)
        if as_json:
            print_json(document)
            return
        console = SafeConsole(highlight=False)
        if not sys.stdout.isatty() or console.is_dumb_terminal:
            for part in plain_picture(document, out.width):
                out.print(part)
            return
        with Poller(lambda: api.overview(), access.address, document, interval) as poller:
            _run(console, poller)


def _overview(api: Admin) -> dict[str, Any]:
    """Return the first overview document. If the gateway's release has no overview, the command ends."""
    try:
        return api.overview()
    except grpc.RpcError as error:
        if error.code() is grpc.StatusCode.UNIMPLEMENTED:
            fail("the gateway is of an older release and has no overview: use `headrace status`")
        raise
    except ValueError as error:
        fail(f"the gateway's answer is no overview: {error}")


def _run(console: SafeConsole, poller: Poller) -> None:
    """Show the overview and react to keys until the user quits. Ctrl-C ends the command with exit code 130."""
    state, shown = TopState(), None
    with (
        keyboard() as keys,
        Live(console=console, screen=True, auto_refresh=False, redirect_stdout=False, redirect_stderr=False) as live,
    ):
        while not state.is_over:
            if shown is None or not state.is_paused:
                shown = poller.picture()
            live.update(screen(shown, state, console.width, console.height), refresh=True)
            if keys is None:
                time.sleep(KEYS_S)
                continue
            for key in keys.read(KEYS_S):
                state = pressed(state, key)


class Poller:
    """Reads the overview in a thread, so that `top` reacts to keys at once even if the gateway is slow. Used as a
    context manager.

    After a failed read, `picture` returns the last document together with its age and the error.
    """

    def __init__(
        self,
        ask: Callable[[], dict[str, Any]],
        address: str,
        document: dict[str, Any],
        interval_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._ask = ask
        self._address = address
        self._interval_s = interval_s
        self._clock = clock
        self._lock = threading.Lock()
        self._document, self._at, self._error = document, clock(), ""
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._poll, name="overview", daemon=True)

    def __enter__(self) -> Poller:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()

    def picture(self) -> Picture:
        """Return the newest overview document with its age, and the error of the last read if that read failed."""
        with self._lock:
            return Picture(self._document, max(self._clock() - self._at, 0.0), self._error)

    def _poll(self) -> None:
        while not self._stopped.wait(self._interval_s):
            error = ""
            try:
                document = self._ask()
            except grpc.RpcError as refusal:
                error = from_rpc(refusal, endpoint=self._address).message
            except ValueError as refusal:
                error = str(refusal)
            with self._lock:
                self._error = error
                if not error:
                    self._document, self._at = document, self._clock()
