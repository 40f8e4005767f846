"""The console in the browser: its cost in the gateway, the delay of its updates, and its resistance to attacks. `--only
PART` runs some of the parts.

`cost`: gateway CPU with 20 open consoles and with none, in turn. `memory`: memory of an hour of history. `pages`: times
in Chromium, while 64 streams run and 20 workers report. `access`: the rules of the accessibility checker axe, on every
page. `hostile`: scripts in every text that a page shows. `roles`: admin requests and pages of each role. `tasks`:
clicks that a person needs for a task.
"""

from __future__ import annotations

from loadtests.scenarios.common import Stage
from loadtests.scenarios.parts import play_parts

PARTS = ("memory", "pages", "access", "hostile", "roles", "tasks", "cost")
"""Names of the modules of loadtests/console. `cost` is last, because that part binds this process and its child
processes to cores.
"""


async def play(stage: Stage) -> None:
    """Run the parts of this scenario that the user selected. Report the rows of all parts, also of those that did not
    run. The rows are in the order of PARTS."""
    await play_parts(stage, "loadtests.console", PARTS)
