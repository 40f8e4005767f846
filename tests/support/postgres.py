"""A real PostgreSQL for tests, on loopback only, with a free port, a temporary folder and an unprivileged user."""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import psycopg
import pytest

from cluster.cli.commands import doctor
from cluster.process.ports import free_port

PASSWORD = "only for this test"
START_S = 180.0


def binaries() -> Path | None:
    """Return the folder with the programs of the newest PostgreSQL; None if PostgreSQL is not installed.

    Debian keeps these programs off PATH.
    """
    installed = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda p: int(p.parts[-3].split(".")[0]))
    if installed:
        return installed[-1].parent
    on_path = shutil.which("initdb")
    return Path(on_path).parent if on_path else None


class PostgresServer:
    """PostgreSQL server that can be started, killed and removed.

    `settings`: further parameters of the server; `{folder}` in a value is the server's folder.
    """

    def __init__(self, programs: Path, settings: Mapping[str, str] | None = None) -> None:
        self._programs = programs
        self._settings = dict(settings or {})
        self.folder = Path(tempfile.mkdtemp(prefix="headrace-pg-"))
        self.port = free_port()
        self._process: subprocess.Popen[bytes] | None = None
        self._as: dict[str, Any] = {}
        if os.geteuid() == 0:  # PostgreSQL refuses to run as root
            nobody = pwd.getpwnam("nobody")
            os.chown(self.folder, nobody.pw_uid, nobody.pw_gid)
            self._as = {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": []}
        self._init()

    def _init(self) -> None:
        password_file = self.folder / "password"
        password_file.write_text(PASSWORD)
        password_file.chmod(0o644)
        command = ["initdb", "--no-sync", "--encoding=UTF8", "--locale=C", "--username=headrace"]
        command += [f"--pwfile={password_file}", "--auth=scram-sha-256", f"--pgdata={self.folder / 'data'}"]
        self.run(*command)

    def run(self, program: str, *arguments: str) -> None:
        """Run a program of PostgreSQL as the server's user, in the server's folder, with the server's password."""
        done = subprocess.run(
            [str(self._programs / program), *arguments],
            capture_output=True, text=True, check=False, cwd=self.folder, env={**os.environ, "PGPASSWORD": PASSWORD},
            **self._as,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr

    def write(self, name: str, text: str) -> None:
        """Write a file below the server's folder. The server's user becomes the owner of the file."""
        file = self.folder / name
        file.parent.mkdir(exist_ok=True)
        file.write_text(text)
        for path in (file, file.parent):
            if self._as:
                os.chown(path, self._as["user"], self._as["group"])

    def url(self, database: str, password: str = PASSWORD) -> str:
        """Return the SQLAlchemy URL of a database."""
        secret = f":{password.replace(' ', '%20')}" if password else ""
        return f"postgresql+psycopg://headrace{secret}@127.0.0.1:{self.port}/{database}"

    def start(self) -> None:
        """Start the server, with the same data and port each time, and wait until the server answers."""
        settings = {
            "listen_addresses": "127.0.0.1",
            "port": str(self.port),
            "unix_socket_directories": "",
            "fsync": "off",
            "shared_buffers": "32MB",
            "max_connections": "40",
            **{key: value.replace("{folder}", str(self.folder)) for key, value in self._settings.items()},
        }
        command = [str(self._programs / "postgres"), "-D", str(self.folder / "data")]
        for key, value in settings.items():
            command += ["-c", f"{key}={value}"]
        with (self.folder / "log").open("ab") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log, cwd=self.folder, **self._as)
        deadline = time.monotonic() + START_S
        while True:
            try:
                self.connect("postgres").close()
                return
            except psycopg.OperationalError as error:
                if self._process.poll() is not None or time.monotonic() > deadline:
                    raise AssertionError((self.folder / "log").read_text()[-2000:]) from error
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self._process.wait(timeout=0.05)

    def connect(self, database: str) -> psycopg.Connection[Any]:
        """Return a connection for the test's own statements."""
        return psycopg.connect(
            host="127.0.0.1", port=self.port, user="headrace", password=PASSWORD, dbname=database, autocommit=True
        )

    def new_database(self) -> str:
        """Create an empty database and return the URL of the database."""
        name = f"t{uuid.uuid4().hex[:12]}"
        with self.connect("postgres") as connection:
            connection.execute(f'CREATE DATABASE "{name}"'.encode())
        return self.url(name)

    def kill(self) -> None:
        """Kill the server, as a crash would. `start` brings the server back."""
        if self._process is not None:
            self._process.send_signal(signal.SIGQUIT)
            self._process.wait(timeout=240)
            self._process = None

    def remove(self) -> None:
        """Stop the server and remove its folder."""
        self.kill()
        shutil.rmtree(self.folder, ignore_errors=True)


@contextlib.contextmanager
def running(settings: Mapping[str, str] | None = None) -> Iterator[PostgresServer]:
    """Run a server with the parameters `settings`. Skips the test if PostgreSQL is not installed."""
    programs = binaries()
    if programs is None:
        pytest.skip(doctor.missing_reason("postgresql"))
    server = PostgresServer(programs, settings)
    try:
        server.start()
        yield server
    finally:
        server.remove()
