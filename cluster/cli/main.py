"""The command line, installed as `headrace` and `cluster`.

A process of the cluster starts without the modules of all other commands: a gateway is back sooner by a fifth.
"""

from __future__ import annotations

import gc
import os
import sys

from cluster.cli import terminal
from cluster.cli.commands import doctor

PROCESSES = ("gateway", "controller", "prepare", "pod")


def main() -> None:
    """The entry point. Refuses to run beside PyPI's `cluster`, whose files would mix with ours."""
    other = doctor.foreign_cluster_package()
    if other is not None:
        finding = doctor.check_name_clash()
        terminal.say(f"error: {finding.missing}, and one of the two is broken; {finding.remedy}", error=True)
        sys.exit(1)
    if sys.argv[1:2] and sys.argv[1] in PROCESSES:
        if sys.argv[1] != "prepare":  # weights are no secret, and may be another user's too
            os.umask(0o077)
        if "gateway" in sys.argv[1:3]:
            gc.disable()  # until it serves: what a start makes stays, and looking for garbage in it takes a tenth of it
            os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")  # to look for some reads a file a package
        _without_rich()
        from cluster.cli.process_commands import app_of

        app_of(sys.argv[1])()
    else:
        from cluster.cli.all_commands import app

        app()


def _without_rich() -> None:
    """structlog imports rich and pygments, where they are installed, for a console that a process does not have."""
    if "rich" in sys.modules:
        return
    sys.modules["rich"] = None  # type: ignore[assignment]
    try:
        import structlog  # noqa: F401
    finally:
        del sys.modules["rich"]


if __name__ == "__main__":
    main()
