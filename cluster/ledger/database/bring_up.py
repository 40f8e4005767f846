"""A database is brought to what this release needs, or it is said why it cannot be used.

As a program, which reads the database's address from standard input, for a gateway that has calls already: the check
imports alembic and compares every table, a fifth of a second of a core, and a thread of the gateway that does so has
held its event loop up by 60 ms.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable
from typing import Final

from cluster.ledger.errors import LedgerError, StoreUnavailable

REFUSED: Final = 3
"""The exit code of a program that says on standard output why not."""
TIMEOUT_S: Final = 600.0


def bring_up(database_url: str) -> None:
    """SQLite's tables are made and migrated, PostgreSQL's only checked. Raises LedgerError."""
    from cluster.ledger.database.migrate import State
    from cluster.ledger.store import Ledger

    ledger = Ledger(database_url)
    try:
        found = ledger.check()
        # Only then: an upgrade takes SQLite's only lock, which calls that are billed meanwhile want too.
        if database_url.startswith("sqlite") and found.state in (State.EMPTY, State.BEHIND):
            ledger.upgrade()
            found = ledger.check()
        if not found.usable:
            ledger.require_usable()
    finally:
        ledger.close()


async def bring_up_elsewhere(
    database_url: str, begun: Callable[[int], None] = lambda pid: None, timeout_s: float = TIMEOUT_S
) -> None:
    """The same in a process of its own, which ends when this is cancelled; `begun` gets its pid. Raises LedgerError."""
    pipe = asyncio.subprocess.PIPE
    try:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "cluster.ledger.database.bring_up", stdin=pipe, stdout=pipe, stderr=pipe,
            start_new_session=True,
        )  # fmt: skip
    except OSError as error:
        raise StoreUnavailable(f"the database cannot be checked: no process can be started: {error}") from error
    begun(process.pid)
    try:
        async with asyncio.timeout(timeout_s):
            out, err = await process.communicate(database_url.encode())
    except TimeoutError:
        raise StoreUnavailable(f"the database cannot be checked: no end within {timeout_s:g} s") from None
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    if process.returncode == REFUSED:
        raise StoreUnavailable(out.decode(errors="replace"))
    if process.returncode:
        last = err.decode(errors="replace").strip().rpartition("\n")[2]
        raise StoreUnavailable(f"the database cannot be checked: exit code {process.returncode} {last}".strip())


def main() -> None:
    """Bring up the database whose address is on standard input."""
    try:
        bring_up(sys.stdin.read())
    except LedgerError as error:
        said = str(error)
    except Exception as error:  # the last line of a traceback need not be the one that helps
        first = next(iter(str(error).strip().splitlines()), "")
        said = f"the database cannot be checked: {type(error).__name__}: {first}"
    else:
        return
    sys.stdout.buffer.write(said.encode())
    sys.exit(REFUSED)


if __name__ == "__main__":
    main()
