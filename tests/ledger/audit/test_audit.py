"""The audit log records the actor, the action and the reason of each event, and never records a key."""

from __future__ import annotations

import hashlib
import json
import threading
from pathlib import Path

import pytest

from cluster.ledger.audit.audit import HIDDEN, AuditEvent, AuditLog, scrub
from cluster.ledger.files import make_secret, read_secrets
from cluster.ledger.store import Ledger
from cluster.policy.tenants.identity import make_key

KEY = make_key("k123", hashlib.sha256(b"x").digest())
SECRETS = [
    KEY,
    KEY[:-5],
    "sk-1234567890abcdef",
    "sk-proj-abc_def-1234",
    "Bearer whatever-it-is",
    "eyJhbGciOiJub25lIn0.eyJzdWIiOiIxIn0.",
    "-----BEGIN EC PRIVATE KEY-----\nMHcCAQEE\n",
]


@pytest.mark.parametrize("secret", SECRETS)
def test_keys_never(secret: str, tmp_path: Path) -> None:
    """A key in any text of an event is not written to the audit file."""
    event = AuditEvent(
        1.0,
        "auth_failure",
        "authenticate",
        actor=f"x {secret}",
        tenant=secret,
        object=f"tenants/{secret}",
        reason=f"tried {secret} and left",
        source=secret,
        details={"a": [secret, {"b": secret}], secret: 1},
    )
    AuditLog(tmp_path / "audit.jsonl").write(event)
    text = (tmp_path / "audit.jsonl").read_text()
    assert secret not in text
    assert secret[-12:].strip() not in text
    assert HIDDEN in text
    assert "tried" in text


def test_key_ids_and_plain_words_stay() -> None:
    """Texts without secrets, including key ids, are kept; long texts are truncated; invalid characters are replaced."""
    for text in ("tenants/acme/keys/k123", "rotated by ops-team@example.com", "task-list", "hr_k123", "漢字"):
        assert scrub(text) == text
    assert len(scrub("x" * 5000)) == 1000
    assert scrub("a\0b\ud800") == "ab?"


def test_lines_of_many_threads_stay_whole(tmp_path: Path) -> None:
    """Concurrent writes produce one JSON object per line, in a private file that is created again after rotation."""
    log = AuditLog(tmp_path / "folder" / "audit.jsonl")

    def write(name: str) -> None:
        for _ in range(100):
            log.write(AuditEvent(1.0, "policy", name, reason="because\nof lines"))

    threads = [threading.Thread(target=write, args=(f"t{n}",)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    path = tmp_path / "folder" / "audit.jsonl"
    assert len([json.loads(line) for line in path.read_text().splitlines()]) == 400
    assert path.stat().st_mode & 0o077 == 0
    path.rename(tmp_path / "old")
    log.write(AuditEvent(2.0, "admin", "x"))
    assert len(path.read_text().splitlines()) == 1


def test_the_ledger_audits_in_file_and_table(tmp_path: Path) -> None:
    """An admin action is written as one line and as one row, with the same id, actor, reason and object."""
    ledger = Ledger(f"sqlite:///{tmp_path / 'l.db'}", audit_file=tmp_path / "a.jsonl", clock=lambda: 7.0)
    ledger.upgrade()
    ledger.record("tenants.suspend", "tenants/acme", tenant="acme", reason="unpaid", actor="k1")
    (row,) = ledger.audit.list()
    assert json.loads((tmp_path / "a.jsonl").read_text()) == row
    assert (row["actor"], row["reason"], row["object"], row["at_s"]) == ("k1", "unpaid", "tenants/acme", 7.0)
    ledger.close()


def test_secrets_come_from_files(tmp_path: Path) -> None:
    """A file of secrets has one secret per line and may have comments. A new file is private. Error messages contain no
    part of the file."""
    path = tmp_path / "s" / "secret"
    make_secret(path)
    (created,) = read_secrets(path, "auth.cluster_secret_file")
    make_secret(path)
    assert read_secrets(path, "auth.cluster_secret_file") == (created,)
    assert path.stat().st_mode & 0o077 == 0
    assert [p.name for p in path.parent.iterdir()] == ["secret"]
    path.write_text("# new\n" + "n" * 32 + "\n\n" + "o" * 40 + "\n")
    assert read_secrets(path, "x") == (b"n" * 32, b"o" * 40)
    for text, word in (("", "holds no secret"), ("hunter2hunter2", "shorter"), (("s" * 32 + "\n") * 2, "twice")):
        path.write_text(text)
        with pytest.raises(ValueError, match=word) as caught:
            read_secrets(path, "auth.api_keys.pepper_file")
        assert "auth.api_keys.pepper_file" in str(caught.value)
        assert "hunter2" not in str(caught.value)
    with pytest.raises(ValueError, match="cannot be read"):
        read_secrets(tmp_path / "none", "x")
