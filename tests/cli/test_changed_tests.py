"""`make test-changed` runs the tests that belong to the changed files."""

from __future__ import annotations

import pytest

from scripts.changed_tests import imported_by, module_of, select_tests

TESTS = {
    "tests/wire/codecs/test_codec.py": {"cluster.wire.codecs.codec", "cluster.wire.codecs.codec.submit_to_pb"},
    "tests/gateway/test_calls.py": {"cluster.gateway.calls", "cluster.gateway.calls.call"},
    "tests/policy/routing/test_router.py": set[str](),
}


@pytest.mark.parametrize(
    ("changed", "picked"),
    [
        ("cluster/wire/codecs/codec.py", ["tests/wire/codecs/test_codec.py"]),
        ("cluster/gateway/calls/call.py", ["tests/gateway/test_calls.py"]),
        ("cluster/policy/routing/router.py", ["tests/policy/routing/test_router.py"]),
        ("tests/wire/codecs/test_codec.py", ["tests/wire/codecs/test_codec.py"]),
        ("docs/README.md", []),
        ("cluster/ledger/store.py", []),
    ],
)
def test_importers_and_mirrors_are_picked(changed: str, picked: list[str]) -> None:
    """For a changed module, the tests that import it are picked, and the test file with the same path below tests/.

    A changed test file is picked itself.
    """
    assert select_tests([changed], TESTS) == picked


def test_both_forms_of_import_are_read() -> None:
    """Modules in `import` statements and in `from` imports are found, also inside functions."""
    source = "import a.b\ndef f():\n    from c.d import e\n"
    assert {"a.b", "c.d", "c.d.e"} <= imported_by(source)
    assert module_of("cluster/wire/__init__.py") == "cluster.wire"
