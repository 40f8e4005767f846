"""The certificate renewal in docs/kubernetes.md renews all certificates and keeps every other secret."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from cryptography import x509

from cluster.cli.commands.run.pod_secrets import MADE_ONCE, manifests
from loadtests.children import Children
from loadtests.hostile.renewal import DOCS, Line, Refused, SecretStore, documented_lines, renew, run_line
from tests.support.shell import headrace

pytestmark = pytest.mark.slow
INSTALL = Line(["pod", "secrets", "--authority", "authority"], "create")
RENEWAL = Line(["pod", "certificates", "--authority", "authority"], "apply")


@pytest.mark.thorough
async def test_keys_work_after_the_documented_renewal_twice(tmp_path: Path) -> None:
    """API keys, and clients that pin the CA, still work after two runs of the documented renewal."""
    async with Children(tmp_path / "logs") as children:
        assert await renew(children, tmp_path / "release", 2, lambda text: None) == 1.0


def test_the_documentation_has_an_install_and_a_renewal() -> None:
    """The documentation has exactly two command lines for certificates: first one that installs them, then one that
    renews them."""
    assert [line.verb for line in documented_lines(DOCS.read_text())] == ["create", "apply"]


def test_a_renewal_prints_no_other_secret(tmp_path: Path) -> None:
    """A renewal never replaces the key pepper, the cluster secret, the database password or Ray's token."""
    store = SecretStore()
    run_line(INSTALL, tmp_path, store)
    made = store.data("headrace-secrets")
    assert set(made) == set(MADE_ONCE)
    for words in (RENEWAL.words, [*RENEWAL.words, "--host", "llm.example.com"], INSTALL.words):
        run_line(Line(words, "apply"), tmp_path, store)
    assert store.data("headrace-secrets") == made


def test_a_second_install_is_refused(tmp_path: Path) -> None:
    """If an operator runs the installation's command for secrets again, Kubernetes refuses the new Secret,
    because the Secret is immutable.

    The new Secret would have another pepper, which would make every API key invalid.
    """
    store = SecretStore()
    run_line(INSTALL, tmp_path, store)
    again = Line(["pod", "secrets"], "apply")
    with pytest.raises(Refused, match=r"headrace-secrets.*immutable"):
        run_line(again, tmp_path, store)


def test_both_authorities_are_kept(tmp_path: Path) -> None:
    """A renewal keeps the certificate authorities of the link and of the client ports. So workers, and clients that
    pin the CA, can still connect.

    Only the owner can read the private keys of these authorities.
    """
    authorities = []
    for _ in range(2):
        objects: Any = manifests("ns", "headrace", (), tmp_path / "authority", 30).objects
        secrets = {manifest["metadata"]["name"]: manifest["stringData"] for manifest in objects}
        authorities.append((secrets["headrace-link-gateway"]["ca.crt"], secrets["headrace-tls"]["ca.crt"]))
    assert authorities[0] == authorities[1]
    assert authorities[0][0] != authorities[0][1]
    modes = {file.stat().st_mode & 0o777 for file in (tmp_path / "authority").rglob("ca.key")}
    assert modes == {0o600}


def test_names_of_the_first_install_are_kept(tmp_path: Path) -> None:
    """A certificate that is renewed without `--host` still has the host names of the first install."""
    folder = tmp_path / "authority"
    manifests("ns", "headrace", ("llm.example.com", "10.0.0.7"), folder, 30)
    (tls,) = (
        manifest
        for manifest in manifests("ns", "headrace", (), folder, 30).objects
        if "headrace-tls" in str(manifest["metadata"])
    )
    certificate = x509.load_pem_x509_certificate(tls["stringData"]["tls.crt"].encode())  # type: ignore[index]
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert "llm.example.com" in names.get_values_for_type(x509.DNSName)
    assert "10.0.0.7" in map(str, names.get_values_for_type(x509.IPAddress))


def test_a_folder_of_an_earlier_release_renews(tmp_path: Path) -> None:
    """An earlier release's `certs ca` made a folder with only the certificate authority of links. Such a folder is
    renewed and gets an authority for client ports.

    If a key of an authority is missing, the commands print no Secrets.
    """
    assert headrace("certs", "ca", str(tmp_path / "authority")).returncode == 0
    done = headrace("pod", "certificates", "--authority", str(tmp_path / "authority"))
    objects = list(yaml.safe_load_all(done.stdout))
    assert {manifest["type"] for manifest in objects} == {"kubernetes.io/tls"}
    assert objects[0]["stringData"]["ca.crt"] == (tmp_path / "authority" / "ca.crt").read_text()
    assert "clients that pin a CA need" in done.stderr
    (tmp_path / "authority" / "ca.key").unlink()
    for command in ("secrets", "certificates"):
        broken = headrace("pod", command, "--authority", str(tmp_path / "authority"))
        assert (broken.returncode, broken.stdout) == (2, "")


def test_a_renewal_of_a_folder_that_is_not_there_prints_nothing(tmp_path: Path) -> None:
    """A renewal with a mistyped folder prints nothing and creates no new authority."""
    done = headrace("pod", "certificates", "--authority", str(tmp_path / "mistyped"))
    assert (done.returncode, done.stdout) == (2, "")
    assert "name the folder of the first install" in done.stderr
    assert not (tmp_path / "mistyped").exists()
