"""Print the test files to run for the changed files. `make test-changed` runs the printed files.

A file counts as changed if it is untracked or differs from BASE (default: HEAD). For a changed test file, the script
prints that file. For a changed module, the script prints the test files that import the module. It also prints the test
file of the same name in the folder that mirrors the module's package.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("cluster", "loadtests", "scripts")


def module_of(path: str) -> str:
    """Return the dotted module name of a Python file, e.g. `cluster.wire.dial` for `cluster/wire/dial.py`."""
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def imported_by(source: str) -> set[str]:
    """Return the dotted names of everything that a source file imports: modules, and objects in modules."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def select_tests(changed: Iterable[str], tests: Mapping[str, set[str]]) -> list[str]:
    """Return the test files to run for the changed files, sorted.

    `tests` has every test file as a key; the value is the set of dotted names that the test file imports.
    """
    picked: set[str] = set()
    for path in changed:
        if path in tests:
            picked.add(path)
        elif path.endswith(".py") and path.startswith(PACKAGES):
            module = module_of(path)
            mirror = f"tests/{path.split('/', 1)[1].removesuffix('.py').rpartition('/')[0]}/"
            mirrored = f"{mirror}test_{Path(path).stem}.py"
            picked |= {test for test, names in tests.items() if module in names or test == mirrored}
    return sorted(picked)


def main() -> None:
    """Print the test files to run, one per line."""
    base = sys.argv[1] if len(sys.argv) > 1 else "HEAD"
    commands = (["git", "diff", "--name-only", base], ["git", "ls-files", "--others", "--exclude-standard"])
    changed = [
        line
        for command in commands
        for line in subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.splitlines()
    ]
    files = {str(file.relative_to(ROOT)): file for file in ROOT.glob("tests/**/test_*.py")}
    print(*select_tests(changed, {name: imported_by(file.read_text()) for name, file in files.items()}), sep="\n")


if __name__ == "__main__":
    main()
