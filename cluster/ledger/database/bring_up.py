"""Prepare a database for this release: migrate SQLite, check PostgreSQL, or report why the database cannot be used.

The module can also run as a program, which reads the database's URL from standard input. A gateway that already serves
calls runs the program instead of calling `prepare_database` in a thread: the check imports alembic and compares every
table, which takes 0.2 s of CPU time. In a thread, the check blocked the gateway's event loop for 60 ms.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable
from typing import Final

from cluster.ledger.errors import LedgerError, StoreUnavailable

REFUSED: Final = 3
"""Exit code of the program if the database cannot be used. The program prints the reason to standard output."""
TIMEOUT_S: Final = 600.0


def prepare_database(database_url: str) -> None:
    """Create and migrate the tables of a SQLite database; only check a PostgreSQL database. Raises LedgerError."""
    from cluster.ledger.database.migrate import SchemaState
    from cluster.ledger.store import Ledger

    ledger = Ledger(database_url)
    try:
        check = ledger.check()
        # Upgrade only if needed: an upgrade takes SQLite's only write lock, which gateways need to store usage.
        if database_url.startswith("sqlite") and check.state in (SchemaState.EMPTY, SchemaState.BEHIND):
            ledger.upgrade()
            check = ledger.check()
        if not check.usable:
            ledger.require_usable()
    finally:
        ledger.close()


async def prepare_database_in_process(
    database_url: str, begun: Callable[[int], None] = lambda pid: None, timeout_s: float = TIMEOUT_S
) -> None:
    """Prepare the database in a child process, which runs this module as a program. Raises LedgerError if the
    database cannot be used, or is not prepared within `timeout_s` seconds.

    `begun` is called with the child's process id after the start. Cancellation kills the child.
    """
    pipe = asyncio.subprocess.PIPE
    try:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "cluster.ledger.database.bring_up", stdin=pipe, stdout=pipe, stderr=pipe,
            start_new_session=True,
        )  # fmt: skip
    except OSError as error:
        raise StoreUnavailable(f"the database cannot be checked: the process cannot be started: {error}") from error
    begun(process.pid)
    try:
        async with asyncio.timeout(timeout_s):
            out, err = await process.communicate(database_url.encode())
    except TimeoutError:
        raise StoreUnavailable(f"the database cannot be checked: not finished within {timeout_s:g} s") from None
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
    """Read a database's URL from standard input and prepare the database."""
    try:
        prepare_database(sys.stdin.read())
    except LedgerError as error:
        reason = str(error)
    except Exception as error:  # the parent would show only the last line of a traceback, often no helpful line
        first = next(iter(str(error).strip().splitlines()), "")
        reason = f"the database cannot be checked: {type(error).__name__}: {first}"
    else:
        return
    sys.stdout.buffer.write(reason.encode())
    sys.exit(REFUSED)


if __name__ == "__main__":
    main()
