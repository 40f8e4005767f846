"""Write the dashboards of helm/files/dashboards. With `--check`, only report the files that are not up to date."""

from __future__ import annotations

import sys
from pathlib import Path

from scripts.dashboards import canary, cost, fairness, model, overview, routing, tenant, workers

FOLDER = Path(__file__).resolve().parents[2] / "helm" / "files" / "dashboards"
COMMAND = "PYTHONPATH=. .venv/bin/python -m scripts.dashboards"
PAGES = (overview, model, tenant, workers, routing, fairness, cost, canary)


def generated() -> dict[Path, str]:
    """Return the text that every dashboard file should have."""
    return {FOLDER / f"{page.NAME}.json": page.board().text() for page in PAGES}


def main(arguments: list[str]) -> int:
    """Write all dashboard files and remove other files. With --check, compare them and write nothing.

    Returns the exit code: 0 if all files are up to date.
    """
    wanted = generated()
    stale = [path for path, text in wanted.items() if not path.exists() or path.read_text() != text]
    unknown = [path for path in FOLDER.glob("*.json") if path not in wanted]
    for path in (*stale, *unknown):
        if "--check" in arguments:
            print(f"{path} is not up to date: run {COMMAND}", file=sys.stderr)
        elif path in wanted:
            path.write_text(wanted[path])
        else:
            path.unlink()
    return int("--check" in arguments and bool(stale or unknown))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
