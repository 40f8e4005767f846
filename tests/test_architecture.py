"""Checks of imports against docs/architecture.md. The message of each check names the rule and the remedy."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parent.parent

PAGE = ROOT / "docs" / "architecture.md"


def _table(page: str) -> dict[str, set[str]]:
    """Return the packages in the table of docs/architecture.md, each with the packages of this project that it may
    import."""
    rows = re.findall(r"^\| (\w+) \| [^|]+ \| ?([\w ]*?) ?\|$", page.split("## Packages")[1].split("\n## ")[0], re.M)
    return {name: set(imports.split()) for name, imports in rows if name != "package"}


MAY_IMPORT = _table(PAGE.read_text())
PURE = ("policy", "api")
NOT_IN_PURE = {"time", "random", "asyncio", "os", "logging", "grpc", "ray", "vllm", "prometheus_client"}
# module -> imports that are allowed as exceptions, with the reason beside each exception
PURE_EXCEPTIONS = {
    "cluster.wire.bundle": {"os"},  # bundles are stored in folders; this module reads and writes them
    "cluster.process.private_files": {"os"},  # every package that keeps state makes it private in the same way
}
ONE_PLACE: dict[str, str | tuple[str, ...]] = {
    "ray": "ray",
    "vllm": "worker",
    "prometheus_client": "observe",
    "h2": "http2",
    "sqlalchemy": "ledger",
    "typer": "cli",
    "opentelemetry": ("observe", "client"),  # the client reads the current span of its program
}
HEAVY = ("torch", "vllm", "ray", "transformers", "opentelemetry")


@dataclass(frozen=True)
class Import:
    """An import: the importing module, and the imported target as a dotted name."""

    module: str
    target: str
    file: Path
    line: int

    def __str__(self) -> str:
        return f"{self.file.relative_to(ROOT)}:{self.line}: {self.module} imports {self.target}"


def module_name(file: Path) -> str:
    """Return the dotted name of a source file."""
    parts = list(file.relative_to(ROOT).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {
    module_name(file): file
    for file in sorted((ROOT / "cluster").rglob("*.py"))
    if "_pb2" not in file.name and "__pycache__" not in file.parts
}


def targets(node: ast.stmt, module: str, is_package: bool) -> Iterator[str]:
    """Yield the dotted names that a statement imports. `from x import y` yields x.y if x.y is a module of this
    project."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        base = node.module or ""
        if node.level:
            parents = module.split(".")
            parents = parents[: len(parents) - node.level + (1 if is_package else 0)]
            base = ".".join([*parents, *([base] if base else [])])
        for alias in node.names:
            whole = f"{base}.{alias.name}"
            yield whole if whole in MODULES or alias.name.endswith(("_pb2", "_pb2_grpc")) else base


def imports_of(source: str, module: str, file: Path) -> list[Import]:
    """Return every import of a file, including imports inside functions and imports for the type checker."""
    tree = ast.parse(source)
    return [
        Import(module, target, file, node.lineno)
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for target in targets(node, module, file.name == "__init__.py")
    ]


ALL = [imported for name, file in MODULES.items() for imported in imports_of(file.read_text(), name, file)]


def package(module: str) -> str:
    """Return the package to which a module of this project belongs, as docs/architecture.md lists it; empty for
    `cluster` itself."""
    parts = module.split(".")
    if "_pb2" in module or parts[1:2] in (["v1"], ["admin"], ["guard"], ["link"]):
        return "pb"
    return parts[1] if len(parts) > 1 else ""


def ours(target: str) -> bool:
    """Return whether an imported name belongs to this project."""
    return target == "cluster" or target.startswith("cluster.")


def against_table(imported: Import) -> bool:
    """Return whether an import violates the table of allowed imports in docs/architecture.md."""
    here, there = package(imported.module), package(imported.target)
    return ours(imported.target) and bool(there) and here != there and there not in MAY_IMPORT.get(here, set())


def test_every_package_has_its_row() -> None:
    """Every package has a row in the table, which states what the package may import."""
    packages = {package(name) for name in MODULES} - {""}
    assert packages == MAY_IMPORT.keys(), "add a row for the new package to the table of docs/architecture.md"


def test_imports_follow_the_table() -> None:
    """Each package imports only the packages that the table in docs/architecture.md allows."""
    wrong = [str(imported) for imported in ALL if against_table(imported)]
    assert not wrong, (
        "\n".join(wrong) + "\nRule: imports follow the table of docs/architecture.md. Remedy: put the type that both "
        "need into cluster/api, take the object as an argument, or compose the two in gateway/server.py, ray or cli."
    )


def test_no_module_imports_itself_indirectly() -> None:
    """There is no cycle between modules, even with lazy and type-only imports."""
    graph: dict[str, set[str]] = {name: set() for name in MODULES}
    for imported in ALL:
        if imported.target in MODULES and imported.target != imported.module:
            graph[imported.module].add(imported.target)
    done: set[str] = set()

    def walk(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, (
            f"cycle: {' -> '.join([*path[path.index(name) :], name])}\nRule: no cycles. "
            "Remedy: move what both need into a third module, or name what one needs of the other as a Protocol."
        )
        if name not in done:
            for other in sorted(graph[name]):
                walk(other, (*path, name))
            done.add(name)

    for name in graph:
        walk(name, ())


def test_pure_packages_are_pure() -> None:
    """Packages that only make decisions use no clock, no randomness and no I/O."""
    wrong = [
        str(imported)
        for imported in ALL
        if package(imported.module) in PURE
        and imported.target.split(".")[0] in NOT_IN_PURE - PURE_EXCEPTIONS.get(imported.module, set())
    ]
    assert not wrong, (
        "\n".join(wrong) + "\nRule: policy and api are pure. "
        "Remedy: take `now` or a seeded generator as an argument, return what is to be done and let the caller do it."
    )


@pytest.mark.parametrize("technology", ONE_PLACE)
def test_one_technology_has_one_place(technology: str) -> None:
    """Each technology, such as Ray, vLLM or the Prometheus client, is imported by one package only."""
    homes = ONE_PLACE[technology]
    homes = (homes,) if isinstance(homes, str) else homes
    wrong = [
        str(imported)
        for imported in ALL
        if imported.target.split(".")[0] == technology and package(imported.module) not in homes
    ]
    assert not wrong, (
        "\n".join(wrong) + f"\nRule: only cluster/{homes[0]} imports {technology}. "
        f"Remedy: add what you need to cluster/{homes[0]} and use it through a port of cluster/api or a plain function."
    )


@pytest.mark.parametrize(
    "module",
    [
        "cluster.gateway.server",
        "cluster.cli.main",
        "cluster.client",
        "cluster.gateway.links.hub",
        "cluster.worker.session",
    ],
)
def test_the_base_install_needs_no_engine(module: str) -> None:
    """The gateway, the command line, the SDK and the link start without torch, vLLM, Ray, transformers and
    OpenTelemetry. The gateway imports OpenTelemetry only if tracing is on."""
    program = f"import sys, {module}; print(*[m for m in {HEAVY!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [], (
        f"importing {module} also imports {done.stdout.split()}\nRule: the base install pulls none of {HEAVY}. "
        "Remedy: import it inside the function that needs it, in cluster/worker or cluster/ray."
    )


@pytest.mark.parametrize(
    ("module", "line", "wrong"),
    [
        ("cluster.policy.routing.router", "from cluster.gateway import call", True),
        ("cluster.policy.routing.router", "from ...gateway.call import Call", True),
        ("cluster.policy.routing.router", "from cluster.api.types import Call", False),
        ("cluster.kube.lease", "def f():\n    from cluster.v1 import inference_pb2", True),
        ("cluster.gateway.calls.call", "from cluster.link.v1 import link_pb2", False),
        ("cluster.worker.engine.simulated.engine", "if TYPE_CHECKING:\n    from cluster.gateway import call", True),
        ("cluster.gateway.server", "from cluster import __version__", False),
    ],
)
def test_the_rule_itself_sees_what_it_should(module: str, line: str, wrong: bool) -> None:
    """The reader of imports recognizes relative, lazy and type-only imports."""
    imports = imports_of(line, module, ROOT / (module.replace(".", "/") + ".py"))
    assert any(against_table(item) for item in imports) is wrong
