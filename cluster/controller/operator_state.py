"""The operators' changes at run time, which the gateways keep for the next controller.

Problem: a controller stores the changes in files in its folder, and a folder may be lost with its pod. Method: every
catalog that a controller sends contains the content of these files, with the time of the last change. Every gateway
keeps the newest state. Before a controller starts, `recover` reads the state from the gateways, and replaces the files
if a gateway has a newer state than the folder. Without any gateway the controller starts from its folder.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import grpc
import structlog

from cluster.link.v1 import link_pb2 as pb
from cluster.link.v1 import link_pb2_grpc as pb_grpc
from cluster.process.private_files import make_private_folder, replace_file
from cluster.wire import dns
from cluster.wire.dial import LinkEnded, open_channel
from cluster.wire.operator_state import MAX_BYTES
from cluster.wire.tls import TlsFiles

log = structlog.get_logger("controller")

CATALOG_FILE, SCALING_FILE = "catalog.json", "scaling.json"
FILES = (CATALOG_FILE, SCALING_FILE)
REVISION_FILE = "operator-state.json"
ANSWER_S = 2.0
RECOVER_S = 10.0
"""Longest time in seconds for which a controller without a stored change waits until a gateway answers."""
PAUSE_S = 0.5


class OperatorState:
    """The operators' changes that are stored in a controller's folder, as a message for the gateways."""

    def __init__(self, folder: Path, wall_s: Callable[[], float] = time.time) -> None:
        """`folder`: the controller's folder. `wall_s` returns seconds since the epoch."""
        self._folder = folder
        self._wall_s = wall_s
        self._revision = _revision(folder)
        self.message = self._read()

    def record_change(self) -> pb.OperatorState | None:
        """Record that a file with changes by operators has changed. Returns the new message for the gateways, or None
        if no change is stored. Raises OSError."""
        # The revision grows even if the clock was set back.
        self._revision = max(self._revision + 1, round(self._wall_s() * 1000))
        replace_file(self._folder / REVISION_FILE, json.dumps({"revision": self._revision}))
        self.message = self._read()
        return self.message

    def _read(self) -> pb.OperatorState | None:
        files = {name: text for name in FILES if (text := _text(self._folder / name)) is not None}
        if not files or not self._revision:
            return None
        document = json.dumps(files).encode()
        if len(document) > MAX_BYTES:
            log.warning("operator_state.too_large", bytes=len(document), most=MAX_BYTES)
            return None
        return pb.OperatorState(revision=self._revision, document=document)


async def recover(
    gateways: Sequence[str],
    tls: TlsFiles | None,
    folder: Path,
    wait_s: float = RECOVER_S,
    resolve: dns.Resolve = dns.resolve,
) -> bool:
    """Replace the files in `folder` if a gateway has a newer state. Returns whether the files were replaced.

    `gateways`: link addresses of the gateways. If the folder has no state, the function waits at most `wait_s`
    until a gateway answers.
    """
    own = _revision(folder)
    until = time.monotonic() + (0.0 if own else wait_s)
    while True:
        answers = await _answers(gateways, tls, resolve)
        if answers or time.monotonic() >= until:
            break
        await asyncio.sleep(PAUSE_S)
    newest = max(answers, key=lambda state: state.revision, default=pb.OperatorState())
    if newest.revision <= own:
        return False
    try:
        files = _files(newest.document)
    except ValueError as error:
        log.warning("operator_state.not_recovered", revision=newest.revision, reason=str(error))
        return False
    make_private_folder(folder)
    for name in FILES:
        if name in files:
            replace_file(folder / name, files[name])
        else:
            (folder / name).unlink(missing_ok=True)
    replace_file(folder / REVISION_FILE, json.dumps({"revision": newest.revision}))
    log.info("operator_state.recovered", revision=newest.revision, files=sorted(files), gateways=len(answers))
    return True


async def _answers(gateways: Sequence[str], tls: TlsFiles | None, resolve: dns.Resolve) -> list[pb.OperatorState]:
    """Return one OperatorState from each gateway that answers. The state is empty if the gateway stores no changes."""
    addresses: dict[str, None] = {}
    for gateway in gateways:
        if not dns.is_dns_name(gateway):
            addresses[gateway] = None
            continue
        try:
            async with asyncio.timeout(ANSWER_S):
                addresses |= dict.fromkeys(await resolve(gateway.removeprefix(dns.SCHEME)))
        except (dns.NoAnswer, TimeoutError) as error:
            log.info("operator_state.gateway_not_asked", gateway=gateway, reason=str(error) or "no answer in time")
    answers = await asyncio.gather(*(_ask(address, tls) for address in addresses))
    return [answer for answer in answers if answer is not None]


async def _ask(address: str, tls: TlsFiles | None) -> pb.OperatorState | None:
    try:
        async with open_channel(address, tls) as channel:
            method: Any = pb_grpc.LinkStub(channel).ReadOperatorState
            answer: pb.OperatorState = await method(pb.ReadOperatorStateRequest(), timeout=ANSWER_S)
            return answer
    except grpc.aio.AioRpcError as error:
        if error.code() is grpc.StatusCode.UNIMPLEMENTED:  # a gateway of an older release has no state
            return pb.OperatorState()
        log.info("operator_state.gateway_not_asked", gateway=address, reason=error.details())
    except LinkEnded as error:
        log.info("operator_state.gateway_not_asked", gateway=address, reason=str(error))
    return None


def _files(document: bytes) -> dict[str, str]:
    """Return the text of each file in a document, by file name. Raises ValueError."""
    values = json.loads(document)
    if not isinstance(values, dict) or not all(isinstance(values.get(name, ""), str) for name in FILES):
        raise ValueError("not an object of files")
    return {name: values[name] for name in FILES if name in values}


def _revision(folder: Path) -> int:
    try:
        return int(json.loads((folder / REVISION_FILE).read_text())["revision"])
    except FileNotFoundError:  # a folder of an older release has files without a revision: any gateway's state is newer
        return 1 if any((folder / name).exists() for name in FILES) else 0
    except (OSError, ValueError, KeyError, TypeError) as error:
        log.warning("operator_state.file_not_read", path=str(folder / REVISION_FILE), reason=str(error))
        return 0


def _text(path: Path) -> str | None:
    try:
        return path.read_text()
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        log.warning("operator_state.file_not_read", path=str(path), reason=str(error))
        return None
