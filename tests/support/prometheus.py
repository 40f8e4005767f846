"""A real Prometheus that scrapes processes of a test and evaluates rules, and its query API."""

from __future__ import annotations

import asyncio
import json
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from cluster.cli.commands import doctor
from cluster.process.ports import free_port
from tests.support.keyed import eventually


@dataclass(frozen=True, slots=True)
class Prometheus:
    """A running Prometheus."""

    address: str

    async def query(self, expression: str) -> list[dict[str, Any]]:
        """Return the current result of a query.

        If Prometheus refuses the query, raises AssertionError with its message.
        """
        return await asyncio.to_thread(self._query, expression)

    def _query(self, expression: str) -> list[dict[str, Any]]:
        url = f"http://{self.address}/api/v1/query?{urllib.parse.urlencode({'query': expression})}"
        try:
            with urllib.request.urlopen(url, timeout=60) as answer:
                result = json.loads(answer.read())["data"]["result"]
        except urllib.error.HTTPError as error:
            if error.code == 503:  # it does not serve yet
                raise
            raise AssertionError(f"{expression}: {error.read().decode()}") from None
        return list(result)

    async def has(self, expression: str) -> bool:
        """Return whether a query has a result; False if Prometheus does not serve yet."""
        try:
            return bool(await self.query(expression))
        except OSError:
            return False


def _write(folder: Path, targets: Mapping[str, Sequence[str]], rules: str) -> None:
    folder.mkdir()
    (folder / "rules.yaml").write_text(rules)
    jobs = [{"job_name": job, "static_configs": [{"targets": list(of)}]} for job, of in targets.items()]
    times = {"scrape_interval": "500ms", "scrape_timeout": "500ms", "evaluation_interval": "1s"}
    config = {"global": times, "rule_files": ["rules.yaml"], "scrape_configs": jobs}
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))


@asynccontextmanager
async def prometheus(folder: Path, targets: Mapping[str, Sequence[str]], rules: str) -> AsyncIterator[Prometheus]:
    """Run a Prometheus that scrapes every half second. `targets`: addresses by job; `rules`: a rules file's text."""
    _write(folder, targets, rules)
    program, address = doctor.find_tool("prometheus"), f"127.0.0.1:{free_port()}"
    assert program is not None
    arguments = [f"--config.file={folder / 'prometheus.yml'}", f"--storage.tsdb.path={folder / 'data'}"]
    with (folder / "log").open("wb") as log:
        process = await asyncio.create_subprocess_exec(
            program, *arguments, f"--web.listen-address={address}", "--log.level=warn", stdout=log, stderr=log
        )
    try:
        made = Prometheus(address)
        up = " and ".join(f'count(up{{job="{job}"}} == 1) == {len(of)}' for job, of in targets.items())
        await eventually(lambda: made.has(up), f"Prometheus scrapes; its log is {folder / 'log'}", 120)
        yield made
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()
