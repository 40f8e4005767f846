"""Contexts: named clusters with their addresses and credentials, in a file of the user.

A context stores where a key is (a file or an environment variable), never the key. `select_target` decides which
address and credentials a command uses. A context is used as a whole: its key is sent only to its own addresses.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from cluster.cli.base import replace_file
from cluster.config.yaml_reader import NotYaml, load

VARIABLE = "HEADRACE_CONTEXT"
ENDPOINT_VARIABLE, KEY_VARIABLE, CA_VARIABLE = "HEADRACE_ENDPOINT", "HEADRACE_API_KEY", "HEADRACE_TLS_CA"
LOCAL = "local"
"""Reserved name of the local cluster, which has no stored context."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")
_VARIABLE_NAME = re.compile(r"[A-Z_][A-Z0-9_]*")
_WEB = re.compile(r"https?://(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9.-]+)(:[0-9]{1,5})?")
_ADDRESS = re.compile(r"(?:unix|dns)://.+|(?:\[[0-9A-Fa-f:.%]+\]|[^:/\s\[\]]+):[0-9]{1,5}")


class ContextError(ValueError):
    """Error: the file of contexts or a selection of a context is invalid. The message names the remedy."""


@dataclass(frozen=True, slots=True)
class ClusterContext:
    """A named cluster: its addresses (host:port), the file of its CA, the location of its API key, and its console's
    URL."""

    name: str
    endpoint: str
    admin: str = ""
    tls_ca: str = ""
    api_key_file: str = ""
    api_key_env: str = ""
    console: str = ""

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name) or self.name == LOCAL:
            raise ContextError(
                f"name {self.name!r}: give letters, digits, '.', '_' or '-', at most 63; {LOCAL!r} is reserved"
            )
        for option, addresses in (("--endpoint", self.endpoint), ("--admin", self.admin)):
            for address in addresses.split(",") if addresses or option == "--endpoint" else ():
                if not _ADDRESS.fullmatch(address):
                    raise ContextError(f"{option} {address!r}: give host:port, without a scheme")
        if self.api_key_env and not _VARIABLE_NAME.fullmatch(self.api_key_env):
            raise ContextError("--api-key-env: give the name of a variable in capital letters, not a key")
        if self.api_key_env and self.api_key_file:
            raise ContextError("--api-key-file and --api-key-env: give one of them")
        if self.console and not _WEB.fullmatch(self.console):
            raise ContextError(f"--console {self.console!r}: give http:// or https://, a host, and no path")


@dataclass(frozen=True, slots=True)
class Contexts:
    """The content of the user's file of contexts. `by_name`: the contexts by name. `current`: the name of the current
    context, "" for none."""

    current: str = ""
    by_name: Mapping[str, ClusterContext] = field(default_factory=dict)

    def get(self, name: str) -> ClusterContext:
        """Return a context. Raises ContextError if there is none of this name."""
        if name not in self.by_name:
            known = ", ".join([*self.by_name, LOCAL])
            raise ContextError(f"there is no context {name!r}; known: {known}; `headrace context add` adds one")
        return self.by_name[name]

    def with_context(self, context: ClusterContext) -> Contexts:
        """Return the contexts with `context` added. It replaces a context of the same name."""
        return replace(self, by_name={**self.by_name, context.name: context})

    def without(self, name: str) -> Contexts:
        """Return the contexts without the context `name`. Raises ContextError if there is none of this name."""
        self.get(name)
        kept = {other: context for other, context in self.by_name.items() if other != name}
        return Contexts("" if self.current == name else self.current, kept)

    def using(self, name: str) -> Contexts:
        """Return the contexts with `name` as the current one. Raises ContextError if there is none of this name."""
        return replace(self, current="" if name == LOCAL else self.get(name).name)


def contexts_file(environment: Mapping[str, str] = os.environ) -> Path:
    """Return the path of the file of contexts, in the user's configuration folder."""
    folder = environment.get("XDG_CONFIG_HOME", "")
    base = Path(folder) if folder.startswith("/") else Path.home() / ".config"  # relative paths are invalid in XDG
    return base / "headrace" / "contexts.yaml"


def read_contexts(file: Path) -> Contexts:
    """Read the file of contexts. If the file is missing, there are no contexts. Raises ContextError."""
    try:
        mode, text = file.stat().st_mode, file.read_text()
    except FileNotFoundError:
        return Contexts()
    except (OSError, UnicodeDecodeError) as error:
        raise ContextError(f"{file}: cannot be read: {error}") from None
    if mode & (stat.S_IWGRP | stat.S_IWOTH):  # another user could redirect keys to an address of their own
        raise ContextError(f"{file}: other users may write it: chmod 600 {file}")
    try:
        return _parse(load(text))
    except (NotYaml, ContextError, TypeError, AttributeError) as error:
        raise ContextError(f"{file}: {error}; mend the file or remove it") from None


def _parse(data: Any) -> Contexts:
    if data is None:
        return Contexts()
    if not isinstance(data, dict) or not isinstance(data.get("contexts", []), list):
        raise ContextError("expected the keys `current` and `contexts`, a list")
    known = dict.fromkeys(ClusterContext.__dataclass_fields__, str)
    contexts = []
    for entry in data.get("contexts", []):
        if not isinstance(entry, dict) or not entry.keys() <= known.keys() or not {"name", "endpoint"} <= entry.keys():
            raise ContextError(f"contexts: an entry has `name`, `endpoint`, and of {', '.join(known)} any others")
        contexts.append(ClusterContext(**{key: str(value) for key, value in entry.items()}))
    read = Contexts(by_name={context.name: context for context in contexts})
    return read.using(str(data.get("current") or LOCAL))


def write_contexts(file: Path, contexts: Contexts) -> None:
    """Write the file of contexts, with mode 0600. Raises OSError."""
    file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    entries = [{key: value for key, value in asdict(context).items() if value} for context in contexts.by_name.values()]
    replace_file(file, yaml.safe_dump({"current": contexts.current or LOCAL, "contexts": entries}, sort_keys=False))


# ---- what a command uses


@dataclass(frozen=True, slots=True)
class TypedOptions:
    """The values of options on the command line; "" or None for an option that the user did not give."""

    context: str = ""
    endpoint: str = ""
    admin: str = ""
    api_key_file: Path | None = None
    tls_ca: Path | None = None


@dataclass(frozen=True, slots=True)
class ClusterTarget:
    """The cluster that a command uses.

    A target without `endpoint` and `admin` stands for the local cluster that is up. If no local cluster is up, the
    target stands for the default endpoint. `tls_ca_is_general`: the CA is from HEADRACE_TLS_CA, which a local cluster
    does not use.
    """

    endpoint: str | None = None
    admin: str | None = None
    api_key_file: Path | None = None
    api_key_env: str = KEY_VARIABLE
    tls_ca: Path | None = None
    tls_ca_is_general: bool = False
    context: str = ""
    console: str = ""

    @property
    def is_named(self) -> bool:
        """Whether the user has given an address, by an option, an environment variable or a context."""
        return self.endpoint is not None or self.admin is not None


def select_target(typed: TypedOptions, environment: Mapping[str, str], contexts: Contexts) -> ClusterTarget:
    """Decide which cluster and credentials a command uses. Raises ContextError.

    The sources of an address, from the highest precedence to the lowest: the options, `--context`, HEADRACE_ENDPOINT or
    HEADRACE_CONTEXT, the current context. Options for the key and the CA replace those of the context.
    """
    name = _context_name(typed, environment, contexts)
    general_ca = Path(environment[CA_VARIABLE]) if environment.get(CA_VARIABLE) else None
    if not name or name == LOCAL:
        endpoint = typed.endpoint or ("" if name == LOCAL else environment.get(ENDPOINT_VARIABLE, ""))
        return ClusterTarget(
            endpoint=endpoint or None,
            admin=typed.admin or None,
            api_key_file=typed.api_key_file,
            tls_ca=typed.tls_ca or general_ca,
            tls_ca_is_general=typed.tls_ca is None,
        )
    context = contexts.get(name)
    key_file = typed.api_key_file or (Path(context.api_key_file) if context.api_key_file else None)
    return ClusterTarget(
        endpoint=context.endpoint,
        admin=context.admin or None,
        api_key_file=key_file,
        api_key_env=context.api_key_env or KEY_VARIABLE,
        tls_ca=typed.tls_ca or (Path(context.tls_ca) if context.tls_ca else general_ca),
        tls_ca_is_general=typed.tls_ca is None and not context.tls_ca,
        context=name,
        console=context.console,
    )


def _context_name(typed: TypedOptions, environment: Mapping[str, str], contexts: Contexts) -> str:
    """Return the name of the context to use; "" for none. Raises ContextError if two options, or two environment
    variables, select different clusters."""
    addressed = [option for option, value in (("--endpoint", typed.endpoint), ("--admin", typed.admin)) if value]
    if typed.context:
        if addressed:
            raise ContextError(f"--context {typed.context} has an address of its own: leave out {addressed[0]}")
        return typed.context
    if addressed:
        return ""
    named = environment.get(VARIABLE, "")
    if environment.get(ENDPOINT_VARIABLE):
        if named:
            raise ContextError(f"{VARIABLE} and {ENDPOINT_VARIABLE} both name a cluster: unset one of them")
        return ""
    return named or contexts.current
