"""Entry point of the command line, installed as `headrace` and `cluster`.

A process of the cluster starts without importing the modules of other commands. This makes the restart of a gateway a
fifth faster.
"""

from __future__ import annotations

import gc
import os
import sys

from cluster.cli import terminal
from cluster.cli.commands import doctor

PROCESSES = ("gateway", "controller", "prepare", "pod")


def main() -> None:
    """Run the command line.

    If PyPI's `cluster` package is installed, the command line exits with an error: the files of both packages would be
    in the same folder.
    """
    other = doctor.foreign_cluster_package()
    if other is not None:
        finding = doctor.check_name_clash()
        terminal.say(f"error: {finding.missing}, and one of the two is broken; {finding.remedy}", error=True)
        sys.exit(1)
    if sys.argv[1:2] and sys.argv[1] in PROCESSES:
        if sys.argv[1] != "prepare":  # weights are not secret, and other users may share them
            os.umask(0o077)
        if "gateway" in sys.argv[1:3]:
            gc.disable()  # until the gateway serves: objects made at start stay; collecting takes 10% of the start time
            os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")  # plugin discovery reads a file per package
        _without_rich()
        from cluster.cli.process_commands import app_of

        app_of(sys.argv[1])(prog_name="headrace")
    else:
        from cluster.cli.all_commands import app

        app(prog_name="headrace")


def _without_rich() -> None:
    """Import structlog without rich and pygments.

    structlog imports rich and pygments if they are installed, and only output to a console needs them.
    """
    if "rich" in sys.modules:
        return
    sys.modules["rich"] = None  # type: ignore[assignment]
    try:
        import structlog  # noqa: F401
    finally:
        del sys.modules["rich"]


if __name__ == "__main__":
    main()
