"""The page and its static files: headers, entity tags, compression, and no access to other files."""

from __future__ import annotations

import gzip
import json
import urllib.parse
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from structlog.testing import capture_logs

from cluster.gateway.console.pages import CSP, FOLDER, STATIC, page_endpoints, read_files
from tests.support.cluster import TestCluster
from tests.support.console import Browser
from tests.support.http import Reply

FILES = read_files()


@pytest.mark.parametrize("path", ["/", *(f"{STATIC}{name}" for name in FILES)])
async def test_each_file_is_served(cluster: TestCluster, path: str) -> None:
    """The page and each file of the folder are served unchanged, with the headers that protect the page."""
    reply = await Browser(cluster).fetch(path)
    name = path.removeprefix(STATIC) if path != "/" else "index.html"
    assert (reply.status, reply.body) == (200, (FOLDER / name).read_bytes())
    assert reply.headers["content-security-policy"] == CSP
    assert reply.headers["x-content-type-options"] == "nosniff"
    assert reply.headers["referrer-policy"] == "no-referrer"
    assert reply.headers["cross-origin-opener-policy"] == "same-origin"
    assert reply.headers["cache-control"] == "no-cache"


def test_the_policy_allows_own_scripts_only() -> None:
    """The content security policy allows scripts, styles and requests of this host only, no inline code, and no frame
    around the page."""
    directives = dict(part.strip().split(" ", 1) for part in CSP.split(";"))
    assert directives["default-src"] == "'none'"
    for name in ("script-src", "style-src", "connect-src", "form-action"):
        assert directives[name] == "'self'"
    assert directives["frame-ancestors"] == directives["base-uri"] == "'none'"
    assert directives["require-trusted-types-for"] == "'script'"
    assert "unsafe" not in CSP
    assert "http" not in CSP


async def test_an_unchanged_file_is_not_sent_again(cluster: TestCluster) -> None:
    """A browser that sends the current entity tag of a file gets 304 without a body. For another tag it gets the
    file."""
    browser = Browser(cluster)
    etag = (await browser.fetch("/")).headers["etag"]
    for tags in (etag, f'"x", {etag}'):
        reply = await browser.fetch("/", if_none_match=tags)
        assert (reply.status, reply.body, reply.headers["etag"]) == (304, b"", etag)
        assert reply.headers["content-security-policy"] == CSP
    assert (await browser.fetch("/", if_none_match='"x"')).status == 200


async def test_files_are_compressed(cluster: TestCluster) -> None:
    """A browser that accepts gzip gets the same content compressed. A HEAD request gets no content."""
    browser = Browser(cluster)
    for _ in range(2):
        reply = await browser.fetch("/", accept_encoding="gzip, br")
        assert reply.headers["content-encoding"] == "gzip"
        assert gzip.decompress(reply.body) == (FOLDER / "index.html").read_bytes()
    reply = await browser.fetch("/", method="POST")
    assert (reply.status, reply.headers["allow"]) == (405, "GET, HEAD")


SECRET = "a file outside of the folder"


@pytest.mark.parametrize(
    "name",
    [
        "",
        "..",
        "../app.py",
        "..%2fapp.py",
        "%2e%2e/app.py",
        "%2e%2e%2fapp.py",
        "..%5capp.py",
        "....//app.py",
        "./index.html",
        "%2findex.html",
        "/etc/passwd",
        "%00index.html",
        "index.html%00",
        "index.html/",
        "index.html/..",
        "INDEX.HTML",
        "index.html%20",
    ],
)
async def test_no_other_file_is_reached(cluster: TestCluster, name: str) -> None:
    """A path that is not exactly the path of a listed file gets 404."""
    reply = await Browser(cluster).fetch(f"{STATIC}{name}")
    assert reply.status == 404


@given(st.text(max_size=40))
def test_every_endpoint_is_a_file_of_the_folder(name: str) -> None:
    """A path below the console's static prefix is an endpoint if and only if it names one of the console's files."""
    endpoints = page_endpoints(FILES)
    assert (f"{STATIC}{name}" in endpoints) == (name in FILES)


def test_links_and_other_files_are_left_out(tmp_path: Path) -> None:
    """Only files of known types are served. Links out of the folder and files of other types are not."""
    folder = tmp_path / "static"
    (folder / "kept").mkdir(parents=True)
    (tmp_path / "outside.js").write_text(SECRET)
    (folder / "link.js").symlink_to(tmp_path / "outside.js")
    (folder / "app.js").write_text("1")
    (folder / "kept" / "library.js").write_text("2")
    (folder / "app.py").write_text(SECRET)
    (folder / ".hidden").write_text(SECRET)
    assert set(read_files(folder)) == {"app.js", "kept/library.js"}
    assert read_files(tmp_path / "nothing") == {}


async def report(cluster: TestCluster, body: bytes) -> Reply:
    """Send the gateway a report of a violated content security policy, as a browser does: without session or token, and
    with the content type of such reports."""
    kind = "application/csp-report"
    return await Browser(cluster).fetch("/console/csp-report", body, content_type=kind, x_csrf_token="")


async def test_reports_of_the_policy_are_counted(cluster: TestCluster) -> None:
    """All browsers' reports of violations of the content security policy are counted, and only a few are logged. Log
    lines do not contain the text of the blocked script."""
    fields = {"effective-directive": "script-src-elem", "blocked-uri": "inline", "script-sample": SECRET}
    with capture_logs() as logs:
        for _ in range(5):
            assert (await report(cluster, json.dumps({"csp-report": fields}).encode())).status == 204
    lines = [line for line in logs if line["event"] == "console.csp_reported"]
    assert 1 <= len(lines) <= 3
    assert (lines[0]["directive"], lines[0]["blocked"]) == ("script-src-elem", "inline")
    assert SECRET not in str(lines)
    page = cluster.gateway.metrics.render("")[1].decode()
    assert 'headrace_console_csp_reports_total{headrace_cluster="test"} 5.0' in page


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=30, deadline=None)
@given(
    st.binary(max_size=200)
    | st.recursive(
        st.none() | st.integers() | st.text(max_size=20),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["csp-report", "a"]), inner),
    ).map(lambda value: json.dumps(value).encode())
)
async def test_any_report_is_taken(cluster: TestCluster, body: bytes) -> None:
    """A report of any form is answered with 204."""
    assert (await report(cluster, body)).status == 204


async def test_a_long_report_is_refused(cluster: TestCluster) -> None:
    """A report of more than 16 KiB is refused."""
    assert (await report(cluster, b"x" * 20_000)).status == 413


def test_paths_need_no_quoting() -> None:
    """The names of the files need no escaping in a URL."""
    assert all(urllib.parse.quote(name) == name for name in FILES)
