"""The command `support-bundle` writes an archive that only its owner can read, with or without a running cluster."""

from __future__ import annotations

import gzip
import http.server
import io
import json
import tarfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import Result

from cluster.admin.v1 import admin_pb2
from tests.cli.commands.operate.test_explain import explained_call
from tests.support.overviews import overview
from tests.support.scripted_gateway import ScriptedGateway

Run = Callable[..., Result]
KEY = "hr_k1_0123456789abcdefghij"


@pytest.fixture
def metrics() -> Iterator[str]:
    """The address of a running server with one page of metrics."""

    class Page(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            """Answer with one metric sample."""
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b'headrace_requests_total{tenant="acme"} 3\n')

        def log_message(self, format: str, *args: Any) -> None:
            """Write no log."""

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Page)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    thread.join()
    server.server_close()


def unpacked(file: Path) -> dict[str, Any]:
    """Return the files of an archive by name. JSON files are parsed; other files are texts."""
    found: dict[str, Any] = {}
    with tarfile.open(fileobj=io.BytesIO(file.read_bytes())) as archive:
        for entry in archive:
            opened = archive.extractfile(entry)
            assert opened is not None
            text, name = opened.read().decode(), entry.name.partition("/")[2]
            found[name] = json.loads(text) if name.endswith(".json") else text
    return found


@pytest.mark.slow
def test_a_bundle_of_a_running_cluster(
    run: Run, gateway: ScriptedGateway, metrics: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The archive has configuration, state, routing decisions, metrics and events.

    Keys and passwords are left out, and names of tenants are hashed.
    """
    monkeypatch.setenv("HEADRACE_API_KEY", KEY)
    config, log, values = tmp_path / "c.yaml", tmp_path / "gateway.log", tmp_path / "values.yaml"
    config.write_text(
        "api_version: headrace/v1\nname: demo\nmodels: []\nstore: {database_url: 'postgresql://u:pw123456@h/d'}\n"
    )
    log.write_text(json.dumps({"event": "call.ended", "tenant": "acme"}) + f"\nprint of {KEY}\n")
    values.write_text("config: {name: demo}\nextraEnv: [{name: A, value: pw123456}]\n")
    gateway.script.entries = [admin_pb2.CatalogEntry(name="sim", state="READY")]
    gateway.script.workers = [admin_pb2.Worker(worker_id="w1", model="sim")]
    gateway.script.overview = json.dumps(overview(calls=1)).encode()
    gateway.script.explained = [explained_call()]
    target = tmp_path / "out.tar.gz"
    done = run(
        "support-bundle", "-o", str(target), "-f", str(config), "--log", str(log), "--values", str(values),
        "--metrics", metrics, "--admin", gateway.endpoint, "--hash-names",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    assert target.stat().st_mode & 0o777 == 0o600
    files = unpacked(target)
    assert set(files) == {
        "manifest.json", "machine.json", "configuration.json", "configuration-check.json", "chart-values-0.json",
        "catalog.json", "workers.json", "overview.json", "scaling.json", "routing.json", "metrics-0.prom",
        "events-0-gateway.json",
    }  # fmt: skip
    assert files["catalog.json"]["models"][0]["name"] == "sim"
    assert files["workers.json"][0]["worker_id"] == "w1"
    assert files["routing.json"][0]["routes"][0]["reason"] == "cached_prefix"
    assert files["configuration.json"]["name"] == "demo"
    assert not files["configuration-check.json"]["is_valid"]
    manifest = files["manifest.json"]
    assert {each["name"] for each in manifest["files"]} == set(files) - {"manifest.json"}
    assert manifest["has_hashed_names"]
    assert {each["name"] for each in manifest["left_out"]} == {"events-0-gateway.json, a part"}
    data = gzip.decompress(target.read_bytes())
    for secret in (KEY, "pw123456", "acme"):
        assert secret.encode() not in data
    tenant = files["events-0-gateway.json"][0]["tenant"]
    assert tenant.startswith("tenant-")
    assert f'tenant="{tenant}"' in files["metrics-0.prom"]


def test_a_bundle_without_a_cluster(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The archive is written even if the gateway is unreachable and there is no configuration.

    The manifest gives the reason for each missing part.
    """
    monkeypatch.chdir(tmp_path)
    done = run("support-bundle", "--admin", "127.0.0.1:1", "--metrics", "127.0.0.1:1", "--metrics", "nonsense")
    assert done.exit_code == 0, done.output
    (file,) = tmp_path.glob("headrace-support-*.tar.gz")
    reasons = {each["name"]: each["reason"] for each in unpacked(file)["manifest.json"]["left_out"]}
    assert "127.0.0.1:1" in reasons["catalog.json"]
    assert "127.0.0.1:1" in reasons["overview.json"]
    assert "does not answer" in reasons["metrics-0.prom"]
    assert "no host:port" in reasons["metrics-1.prom"]
    assert "give it with -f" in reasons["configuration.json"]
    assert "left out: overview.json" in done.stderr


def test_an_archive_that_cannot_be_written(run: Run, tmp_path: Path) -> None:
    """If the archive's folder does not exist, the exit code is 1 and no file is written."""
    done = run("support-bundle", "--admin", "127.0.0.1:1", "-o", str(tmp_path / "none" / "x.tar.gz"))
    assert (done.exit_code, "cannot be written" in done.stderr) == (1, True)
    assert list(tmp_path.rglob("*.tar.gz")) == []
