"""Backups of the Helm chart: the CronJob, its volume, and its program with a real PostgreSQL."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cluster.ledger.rows import UsageQuery
from cluster.ledger.store import Ledger
from tests.ledger.samples import record
from tests.support import helm, postgres
from tests.support.kubernetes_schemas import RELEASES, check_built_in

pytestmark = pytest.mark.slow
TRIAL = next(path for path in helm.PRESETS if path.stem == "local-cpu")
UPLOAD = {
    "image": "rclone/rclone:1.71",
    "args": ["copy", "/backup", "store:headrace"],
    "env": [{"name": "RCLONE_CONFIG_STORE_TYPE", "value": "s3"}],
}


def pod(rendered: helm.Rendered) -> dict[str, Any]:
    """Return the pod spec of the backup's CronJob."""
    job = rendered.only("CronJob")["spec"]["jobTemplate"]
    return dict(job["spec"]["template"]["spec"])


def rendered_backup(**backup: Any) -> helm.Rendered:
    """Return the chart rendered with backups on. `backup`: further values of the section `backup`."""
    return helm.template(TRIAL, {"backup": {"enabled": True, **backup}})


def test_backups_are_off_until_turned_on() -> None:
    """Without `backup.enabled` there is neither a CronJob nor a volume claim."""
    rendered = helm.template(TRIAL)
    assert rendered.all("CronJob") == []
    assert rendered.all("PersistentVolumeClaim") == []


def test_dumps_have_a_volume_of_their_own() -> None:
    """Backups have a volume claim of their own, which survives `helm uninstall`. An existing claim can be used instead.

    The objects satisfy the Kubernetes schemas.
    """
    rendered = rendered_backup()
    claim = rendered.only("PersistentVolumeClaim")
    assert claim["metadata"]["annotations"] == {"helm.sh/resource-policy": "keep"}
    name = claim["metadata"]["name"]
    assert {"name": "backup", "persistentVolumeClaim": {"claimName": name}} in pod(rendered)["volumes"]
    for release in RELEASES:
        for item in (claim, rendered.only("CronJob")):
            check_built_in(item, release)
    own = rendered_backup(storage={"claimName": "dumps"})
    assert own.all("PersistentVolumeClaim") == []
    assert {"name": "backup", "persistentVolumeClaim": {"claimName": "dumps"}} in pod(own)["volumes"]


def test_an_upload_comes_after_the_dump() -> None:
    """With `upload`, the dump runs in an init container, so that the upload starts after the dump is complete.

    The upload container mounts the volume read-only.
    """
    spec = pod(rendered_backup(upload=UPLOAD))
    (dump,), (upload,) = spec["initContainers"], spec["containers"]
    assert (dump["name"], upload["name"], upload["image"]) == ("backup", "upload", UPLOAD["image"])
    assert upload["args"] == UPLOAD["args"]
    assert {"name": "backup", "mountPath": "/backup", "readOnly": True} in upload["volumeMounts"]
    assert "PGPASSWORD" not in {variable["name"] for variable in upload["env"]}


@pytest.mark.parametrize("upload", [{}, UPLOAD])
def test_a_dump_reaches_the_database_as_gateways_do(upload: dict[str, Any]) -> None:
    """The container that dumps has the volumes and variables of gateways; the container that uploads has not."""
    container = {
        "name": "gateway",
        "env": [{"name": "PGSSLMODE", "value": "verify-full"}],
        "volumeMounts": [{"name": "site", "mountPath": "/site"}],
    }
    gateway = {
        "extraEnv": [{"name": "PGSSLROOTCERT", "value": "/pg/ca.crt"}, {"name": "KEEP", "value": "of the gateways"}],
        "extraVolumes": [{"name": "pg", "configMap": {"name": "pg-ca"}}],
        "extraVolumeMounts": [{"name": "pg", "mountPath": "/pg"}],
        "podTemplate": {"spec": {"volumes": [{"name": "site", "emptyDir": {}}], "containers": [container]}},
    }
    spec = pod(helm.template(TRIAL, {"gateway": gateway, "backup": {"enabled": True, "keep": 9, "upload": upload}}))
    (dump,) = spec["initContainers" if upload else "containers"]
    assert {item["mountPath"] for item in dump["volumeMounts"]} == {"/pg", "/site", "/backup", "/tmp"}
    variables = {item["name"]: item.get("value") for item in dump["env"]}  # of two with one name the last holds
    assert variables["PGSSLROOTCERT"] == "/pg/ca.crt"
    assert variables["PGSSLMODE"] == "verify-full"
    assert variables["KEEP"] == "9"
    assert {item["name"] for item in spec["volumes"]} == {"pg", "site", "backup", "tmp"}
    if upload:
        assert {item["mountPath"] for item in spec["containers"][0]["volumeMounts"]} == {"/backup", "/tmp"}


@pytest.mark.parametrize(
    ("values", "part"),
    [
        ({"backup": {"enabled": True, "upload": {"args": ["x"]}}}, "backup.upload.image"),
        ({"backup": {"enabled": True, "keep": 0}}, "keep"),
        (
            {
                "backup": {"enabled": True},
                "postgresql": {"embedded": {"enabled": False}},
                "config": {"store": {"database_url": "sqlite:////data/x"}},
            },
            "backup.enabled",
        ),
    ],
)
def test_wrong_values_are_refused(values: dict[str, Any], part: str) -> None:
    """The error for an invalid backup value names the value."""
    with pytest.raises(helm.HelmFailed, match=part):
        helm.template(TRIAL, values)


@pytest.fixture(scope="module")
def server() -> Iterator[postgres.PostgresServer]:
    """A PostgreSQL server."""
    with postgres.running() as running:
        yield running


@pytest.mark.needs("postgresql")
def test_the_program_dumps_and_keeps_the_newest(server: postgres.PostgresServer, tmp_path: Path) -> None:
    """The backup program writes a dump that `pg_restore` can restore, and keeps only the newest dumps.

    If the database is unreachable, the program fails and leaves the earlier dumps unchanged.
    """
    url = server.new_database()
    ledger = Ledger(url)
    ledger.upgrade()
    ledger.usage.insert([record("r1"), record("r2")])
    ledger.close()
    (container,) = pod(rendered_backup(keep=2))["containers"]
    given = {item["name"]: item.get("value", "") for item in container["env"]}
    assert given["DATABASE_URL"] == "postgresql://headrace@headrace-postgresql/headrace"
    programs = postgres.binaries()
    assert programs is not None
    environment = {
        **os.environ, **given, "FOLDER": str(tmp_path), "PGPASSWORD": postgres.PASSWORD, "PGCONNECT_TIMEOUT": "20",
        "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}", "HOME": str(tmp_path),
    }  # fmt: skip
    for day in ("01", "02"):
        (tmp_path / f"headrace-202001{day}T000000Z.dump").write_text("old")

    def run(address: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*container["command"], *container["args"]],
            env={**environment, "DATABASE_URL": address}, capture_output=True, text=True, check=False,
        )  # fmt: skip

    address = f"postgresql://headrace@127.0.0.1:{server.port}/{url.rsplit('/', 1)[1]}"
    before = sorted(tmp_path.iterdir())
    assert run(address + "_none").returncode != 0
    assert sorted(tmp_path.iterdir()) == before
    done = run(address)
    assert done.returncode == 0, done.stderr
    older, newest = sorted(tmp_path.glob("headrace-*.dump"))
    assert older.name == "headrace-20200102T000000Z.dump"
    restored = server.new_database()
    target = f"postgresql://headrace@127.0.0.1:{server.port}/{restored.rsplit('/', 1)[1]}"
    command = ["pg_restore", "--no-owner", "--exit-on-error", "--single-transaction", f"--dbname={target}", str(newest)]
    subprocess.run(command, env=environment, check=True)
    ledger = Ledger(restored)
    ledger.require_usable()
    (total,) = ledger.usage.query(UsageQuery(("tenant",)))
    assert (total["tenant"], total["requests"]) == ("acme", 2)
    ledger.close()
