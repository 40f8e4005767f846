"""Access of a command to an admin port: address, credential and trusted certificate.

For a local cluster, the command finds all three without options. The address is in the run folder. The credential is
made from the cluster secret, since a user who may read the secret is an operator. The trusted certificate is the
gateway's own certificate file, since the gateway is on this host.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field, replace
from pathlib import Path

import grpc

from cluster.cli.common import USAGE, admin_endpoint, api_key, fail, local_run
from cluster.cli.target.contexts import ClusterTarget
from cluster.client.options import ChannelOptions
from cluster.config.document import ConfigError, load
from cluster.config.paths import secret_files
from cluster.config.schema import Config


@dataclass(frozen=True, slots=True)
class Access:
    """Address, credential and TLS settings of an admin port.

    `roots` has the trusted certificates in PEM format; None means a connection without TLS. `name` is the name that
    the certificate must have. `context` is the name of the context that has the address, if any. `console` is the URL
    of the cluster's console, "" if it is not known here.
    """

    address: str
    key: str = field(default="", repr=False)
    roots: bytes | None = None
    name: str = ""
    context: str = ""
    console: str = ""

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        """The gRPC metadata that is sent with each call."""
        return (("authorization", f"Bearer {self.key}"),) if self.key else ()

    def channel(self) -> grpc.Channel:
        """Open a channel to the admin port."""
        options = ChannelOptions((self.address,)).channel_options()
        if self.roots is None:
            return grpc.insecure_channel(self.address, options=options)
        if self.name:
            options.append(("grpc.ssl_target_name_override", self.name))
        return grpc.secure_channel(self.address, grpc.ssl_channel_credentials(self.roots), options=options)


def admin_access(target: ClusterTarget) -> Access:
    """Return the address, credential and certificate with which a command reaches the admin port of its target.

    If the address belongs to the local cluster, that cluster's credential and certificate are used, except where an
    option or the target's context gives another one. If the file of a key or certificate cannot be read, the command
    ends with exit code 2.
    """
    address = admin_endpoint(target.endpoint, target.admin)
    run = local_run()
    local = Access(address)
    is_local = run is not None and run.endpoints().get("admin") == address
    if run is not None and is_local:
        with contextlib.suppress(ConfigError):  # the file is from another release, or does not exist any more
            config = load(run.config_file)
            local = local_access(address, config)
            local = replace(local, console=console_url(config, run.endpoints().get("http", "")))
    own_key = api_key(target) if target.api_key_file or target.context else ""
    key, console = own_key or local.key or api_key(target), target.console or local.console
    if target.tls_ca is None or (is_local and target.tls_ca_is_general):
        return Access(address, key, local.roots, local.name, target.context, console)
    try:
        return Access(address, key, target.tls_ca.read_bytes(), context=target.context, console=console)
    except OSError as error:
        fail(f"--tls-ca {target.tls_ca}: cannot be read: {error.strerror}", USAGE)


def console_url(config: Config, http: str) -> str:
    """Return the URL of a local cluster's console; "" if the cluster has no console. `http`: address of the cluster's
    HTTP port."""
    gateway = config.gateway
    if not gateway.console.enabled:
        return ""
    scheme = "http" if gateway.tls is None else "https"
    return gateway.console.public_url or (f"{scheme}://{http}" if http else "")


def local_access(address: str, config: Config) -> Access:
    """Return the access to the gateway of a local cluster. `config`: the configuration that the cluster runs with.

    A credential or certificate whose file the user may not read is left out.
    """
    from cluster.gateway.auth.tls import first_dns_name

    tls = config.gateway.tls
    roots = _read(tls.cert_file) if tls is not None else None
    return Access(address, _admin_token(config), roots, first_dns_name(roots) if roots else "")


def _admin_token(config: Config) -> str:
    file = secret_files(config).get("auth.cluster_secret_file")
    if file is None:
        return ""
    from cluster.ledger.files import read_secrets
    from cluster.policy.tenants.identity import admin_token

    try:
        return admin_token(read_secrets(file, "auth.cluster_secret_file")[0])
    except ValueError:
        return ""


def _read(file: Path) -> bytes | None:
    try:
        return file.read_bytes()
    except OSError:
        return None
