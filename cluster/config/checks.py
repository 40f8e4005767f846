"""Rules that compare the models of cluster.yaml with each other and with other sections. A rule does no I/O and yields
the problems that it finds.

A process that reads a configuration refuses the configuration if a rule yields a problem. `headrace config check` adds
warnings about probable mistakes.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, Protocol

from cluster.config.engine import code_arguments, engine_problems, parser_problems, together_problems
from cluster.config.problems import Path, Problem

SCHEMES = ("hf", "s3", "gs", "http", "https", "demo", "sim")
"""Schemes of a source, before `://`. A source without a scheme is a folder."""
DEMO_SOURCES = ("demo://smollm2", "demo://minilm")
_SCHEME_CORRECTIONS = {
    "huggingface": "hf",
    "hugging_face": "hf",
    "hf-hub": "hf",
    "hub": "hf",
    "gcs": "gs",
    "file": "",
    "s3a": "s3",
}

_HUB_NAME = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9_.-]{0,94}[A-Za-z0-9_])?")
_HUB_PAGE = re.compile(r"(www\.)?(huggingface\.co|hf\.co)/(?=[^/]+/[^/]+$)")


class Entry(Protocol):
    """The fields of a model that the rules in this module read."""

    @property
    def name(self) -> str: ...
    @property
    def aliases(self) -> tuple[str, ...]: ...
    @property
    def fallback(self) -> tuple[str, ...]: ...


def source_problem(source: str) -> str:
    """Return why a model's source is invalid, judged by its text alone; "" if the source may be valid."""
    scheme, separator, rest = source.partition("://")
    if not separator:
        return ""
    if scheme not in SCHEMES:
        correct = _SCHEME_CORRECTIONS.get(scheme.lower(), scheme.lower() if scheme.lower() in SCHEMES else None)
        hint = "" if correct is None else f"; did you mean {correct + '://' if correct else ''}{rest}?"
        return f"{source!r} is unknown: use a folder, hf://org/name, s3://, gs://, https:// or demo://smollm2{hint}"
    if scheme == "hf":
        return _hub_problem(source, rest)
    if scheme in ("http", "https") and _HUB_PAGE.match(rest):
        return f"{source!r} is a page of the hub, not a folder of files: write hf://{_HUB_PAGE.sub('', rest)}"
    if scheme == "demo" and source not in DEMO_SOURCES:
        return f"{source!r} is unknown: of this scheme there are {' and '.join(DEMO_SOURCES)}"
    if scheme in ("s3", "gs", "http", "https") and not rest.strip("/"):
        return f"{source!r} names no {'bucket' if scheme in ('s3', 'gs') else 'host'}"
    return ""


def _hub_problem(source: str, name: str) -> str:
    """Return why `name` is not a valid repository name on the Hugging Face hub; "" if it is valid. The rules are those
    of the hub's client."""
    if name.count("/") != 1 or not all(name.split("/")):
        return f"expected hf://organisation/name, got {source!r}"
    plain, at, revision = name.partition("@")
    if at and revision and all(_HUB_NAME.fullmatch(part) for part in plain.split("/")):
        return f"{source!r}: a revision is a key of its own: write source: hf://{plain} and revision: {revision}"
    if not all(_HUB_NAME.fullmatch(part) for part in name.split("/")) or "--" in name or ".." in name:
        return (
            f"{source!r} is no name that the hub has: organisation and name are letters, digits, '-', '_' and '.', "
            "1 to 96 characters, with a letter, digit or '_' at both ends and neither '--' nor '..'"
        )
    return "a repository's name on the hub does not end in .git" if name.endswith(".git") else ""


def engine_of(path: Path, source: str, engine: Mapping[str, Any], whole: Mapping[str, Any]) -> Iterator[Problem]:
    """Yield a problem for each argument of an `engine:` section that vLLM or Headrace refuses.

    For a simulated engine, which has other arguments, only the names of parsers are checked. `whole`: all arguments
    with which the engine is started, including those from outside the section.
    """
    if source.startswith("sim://"):
        for key, text in parser_problems(engine):
            yield Problem((*path, key), text)
        return
    single = [*engine_problems(engine)]
    for key, text in single or together_problems(whole):
        yield Problem((*path, *key.split(".")), text)


def code_of(path: Path, engine: Mapping[str, Any]) -> Iterator[Problem]:
    """Yield a problem for each argument of an `engine:` section that names code to run.

    Callers apply this rule only if `weights.allow.remote_code` is false.
    """
    for key, text in code_arguments(engine):
        yield Problem((*path, *key.split(".")), text)


def names(models: Sequence[Entry]) -> Iterator[Problem]:
    """Yield a problem for each name or alias that is used twice, at each use except the first."""
    owner: dict[str, tuple[int, str]] = {}
    for at, model in enumerate(models):
        for number, name in enumerate((model.name, *model.aliases)):
            if name in owner:
                before, other = owner[name]
                where: Path = ("models", at, "name") if not number else ("models", at, "aliases", number - 1)
                users = f"'{other}' and '{model.name}'" if before != at else f"'{model.name}' twice"
                yield Problem(where, f"the name {name!r} is used by {users}: rename one, or remove it")
            owner.setdefault(name, (at, model.name))


def fallbacks(models: Sequence[Entry], absent: Collection[str] = ()) -> Iterator[Problem]:
    """Yield a problem for each fallback that names no model, names the model itself, or leads back to the model.

    `absent`: names of models that were left out because of an invalid entry.
    """
    owner = {name: model for model in models for name in (model.name, *model.aliases)}
    for at, model in enumerate(models):
        for number, name in enumerate(model.fallback):
            where: Path = ("models", at, "fallback", number)
            if name not in owner:
                if name not in absent:
                    yield Problem(where, f"there is no model {name!r}{_near_name(name, [*owner])}")
            elif owner[name].name == model.name:
                yield Problem(where, f"{name!r} is the model itself")
            elif cycle := _cycle(model.name, owner[name], owner, ()):
                yield Problem(
                    where,
                    f"leads back to {model.name!r} ({' -> '.join((model.name, *cycle))}): a call tries each fallback "
                    "once and no fallback of a fallback; end the chain at one model",
                )


def _cycle(start: str, model: Entry, owner: Mapping[str, Entry], path: tuple[str, ...]) -> tuple[str, ...]:
    """Follow the fallbacks of `model`. Return the names on the way from `model` back to `start`; empty if no fallback
    leads back to `start`. `owner`: models by name and alias. `path`: names on the way to `model`."""
    if model.name == start:
        return (*path, start)
    if model.name in path:
        return ()
    for name in model.fallback:
        if name in owner and (cycle := _cycle(start, owner[name], owner, (*path, model.name))):
            return cycle
    return ()


def _near_name(name: str, known: Sequence[str]) -> str:
    import difflib

    near = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {near[0]!r}?" if near else f"; there {'is' if len(known) == 1 else 'are'} {_list(known)}"


def _list(words: Sequence[str]) -> str:
    few = ", ".join(words[:6])
    return f"{few}, ..." if len(words) > 6 else few


Need = tuple[int, str, int, int]
"""A model's position, a GPU type, the GPUs of one replica, and the minimum number of replicas.

A model has one Need for each GPU type on which the model may run.
"""


def budgets(needs: Sequence[Need], budget: Mapping[str, int]) -> Iterator[Problem]:
    """Yield the problems of the GPU budgets in `scaling.gpu_budget`.

    A model has a problem if each budget of its GPU types is too small for one replica. A budget has a problem if it is
    too small for the minimum replicas of all models that can use only this GPU type.
    """
    by_model: dict[int, list[Need]] = {}
    for need in needs:
        by_model.setdefault(need[0], []).append(need)
    used: dict[str, int] = {}
    for at, choices in by_model.items():
        limited = [(kind, gpus, least) for _, kind, gpus, least in choices if kind in budget]
        if not limited or len(limited) < len(choices):
            continue
        if all(gpus > budget[kind] for kind, gpus, _ in limited):
            kind, gpus, _ = limited[0]
            yield Problem(
                ("models", at),
                f"one replica needs {gpus} GPUs{_of(kind)} and scaling.gpu_budget{_key(kind)} is {budget[kind]}: "
                "raise the budget, or lower tensor_parallel_size or pipeline_parallel_size",
            )
        elif len(limited) == 1:
            kind, gpus, least = limited[0]
            used[kind] = used.get(kind, 0) + gpus * least
    for kind, gpus in used.items():
        if gpus > budget[kind]:
            yield Problem(
                ("scaling", "gpu_budget", *([kind] if kind else [])),
                f"is {budget[kind]}, and the models' least replicas together need {gpus} GPUs{_of(kind)}: raise it, or "
                "lower replicas.min",
            )


def _of(kind: str) -> str:
    return f" of type {kind}" if kind else ""


def _key(kind: str) -> str:
    return f".{kind}" if kind else '[""]'


def listeners(addresses: Sequence[tuple[str, str]]) -> Iterator[Problem]:
    """Yield a problem for each listener that would bind the port of an earlier listener on the same host.

    `addresses`: pairs of a key and `host:port`.
    """
    taken: dict[int, list[tuple[str, str]]] = {}
    for key, address in addresses:
        host, _, port = address.rpartition(":")
        if not int(port):
            continue
        for other, other_host in taken.get(int(port), ()):
            if _same_host(host, other_host):
                text = f"{address}: port {int(port)} is {other}'s too: give each listener its own"
                yield Problem(("listen", key), text)
        taken.setdefault(int(port), []).append((f"listen.{key}", host))


def _same_host(first: str, second: str) -> bool:
    hosts = {"127.0.0.1" if host == "localhost" else host.strip("[]") for host in (first, second)}
    return len(hosts) == 1 or bool(hosts & {"0.0.0.0", "::"})  # noqa: S104
