"""Selection of a cluster by options, environment variables and stored contexts, and the file of contexts."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.cli.target.contexts import (
    LOCAL,
    ClusterContext,
    ContextError,
    Contexts,
    TypedOptions,
    contexts_file,
    read_contexts,
    select_target,
    write_contexts,
)

NAMES = st.from_regex(r"[a-z][a-z0-9._-]{0,8}", fullmatch=True).filter(lambda name: name != LOCAL)
ADDRESSES = st.builds("{}:{}".format, st.sampled_from(["a.example", "10.0.0.1", "[::1]", "b"]), st.integers(1, 65535))
PATHS = st.sampled_from(["", "/k/one", "/k/two"])


@st.composite
def cluster_contexts(draw: st.DrawFn) -> ClusterContext:
    """Draw a context with any combination of its optional parts."""
    key_file = draw(PATHS)
    variable = "" if key_file else draw(st.sampled_from(["", "PROD_KEY"]))
    admin = draw(st.one_of(st.just(""), ADDRESSES))
    return ClusterContext(draw(NAMES), draw(ADDRESSES), admin, draw(PATHS), key_file, variable)


@st.composite
def stored(draw: st.DrawFn) -> Contexts:
    """Up to three contexts, one of which may be the current context."""
    contexts = Contexts(by_name={one.name: one for one in draw(st.lists(cluster_contexts(), max_size=3))})
    return contexts.using(draw(st.sampled_from([LOCAL, *contexts.by_name])))


ENVIRONMENTS = st.fixed_dictionaries(
    {},
    optional={
        "HEADRACE_ENDPOINT": st.just("env.example:1"),
        "HEADRACE_TLS_CA": st.just("/env/ca"),
        "HEADRACE_CONTEXT": st.sampled_from(["a", LOCAL, "nowhere"]),
    },
)
OPTIONS = st.builds(
    TypedOptions,
    context=st.sampled_from(["", "", "a", LOCAL]),
    endpoint=st.sampled_from(["", "typed.example:2"]),
    admin=st.sampled_from(["", "typed.example:3"]),
    api_key_file=st.sampled_from([None, Path("/typed/key")]),
    tls_ca=st.sampled_from([None, Path("/typed/ca")]),
)


@given(typed=OPTIONS, environment=ENVIRONMENTS, contexts=stored())
def test_a_contexts_key_goes_to_its_own_address_only(
    typed: TypedOptions, environment: dict[str, str], contexts: Contexts
) -> None:
    """A context's key is used only with that context's own address, whatever else is set.

    If the command line gives an address, that address is used, or the command is refused.
    """
    try:
        target = select_target(typed, environment, contexts)
    except ContextError:
        return
    if target.context:
        context = contexts.by_name[target.context]
        assert (target.endpoint, target.admin or "") == (context.endpoint, context.admin)
        assert not typed.endpoint
        assert not typed.admin
    else:
        assert target.api_key_file == typed.api_key_file
        assert target.api_key_env == "HEADRACE_API_KEY"
        assert (target.admin or "") == typed.admin
        assert target.endpoint in (typed.endpoint or None, environment.get("HEADRACE_ENDPOINT"))


@given(typed=OPTIONS, environment=ENVIRONMENTS, contexts=stored())
def test_the_nearer_choice_wins(typed: TypedOptions, environment: dict[str, str], contexts: Contexts) -> None:
    """An option comes before an environment variable, and a variable before the current context.

    A command is refused if options give both a context and an address. It is also refused if variables give both
    and no option decides.
    """
    both_typed = bool(typed.context and (typed.endpoint or typed.admin))
    both_set = "HEADRACE_CONTEXT" in environment and "HEADRACE_ENDPOINT" in environment
    is_typed = bool(typed.context or typed.endpoint or typed.admin)
    name = typed.context or ("" if is_typed else environment.get("HEADRACE_CONTEXT", contexts.current))
    name = "" if not is_typed and "HEADRACE_ENDPOINT" in environment else name
    refused = both_typed or (both_set and not is_typed) or (name not in ("", LOCAL) and name not in contexts.by_name)
    try:
        target = select_target(typed, environment, contexts)
    except ContextError:
        assert refused
        return
    assert not refused
    assert target.context == ("" if name == LOCAL else name)
    if typed.tls_ca:
        assert target.tls_ca == typed.tls_ca
        assert not target.tls_ca_is_general


@given(contexts=stored())
def test_the_file_keeps_the_contexts(tmp_path_factory: pytest.TempPathFactory, contexts: Contexts) -> None:
    """Contexts that are written to the file are read back unchanged. Only the file's owner can read or write it."""
    file = tmp_path_factory.mktemp("contexts") / "headrace" / "contexts.yaml"
    write_contexts(file, contexts)
    assert read_contexts(file) == contexts
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


def test_the_file_is_in_the_configuration_folder(tmp_path: Path) -> None:
    """The file of contexts is below XDG_CONFIG_HOME if that is an absolute path, else below ~/.config.

    If the file is missing, there are no contexts.
    """
    assert contexts_file({"XDG_CONFIG_HOME": "/x"}) == Path("/x/headrace/contexts.yaml")
    for unset in ({}, {"XDG_CONFIG_HOME": ""}, {"XDG_CONFIG_HOME": "relative"}):
        assert contexts_file(unset) == Path.home() / ".config/headrace/contexts.yaml"
    assert read_contexts(tmp_path / "none.yaml") == Contexts()


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("current: a\n", "no context 'a'"),
        ("contexts: [{name: a}]\n", "endpoint"),
        ("contexts: [{name: a, endpoint: 'b:1', key: hr_x}]\n", "api_key_file"),
        ("contexts: {}\n", "a list"),
        ("- a\n", "a list"),
        ("contexts: [\n", "line"),
        ("contexts: [{name: a, endpoint: b}]\n", "host:port"),
    ],
)
def test_a_wrong_file_is_refused_with_its_name(tmp_path: Path, text: str, part: str) -> None:
    """The error for an invalid contexts file names the file, the mistake and the remedy."""
    file = tmp_path / "contexts.yaml"
    file.write_text(text)
    with pytest.raises(ContextError, match=r"mend the file") as error:
        read_contexts(file)
    assert str(file) in str(error.value)
    assert part in str(error.value)


def test_a_file_that_others_may_write_is_refused(tmp_path: Path) -> None:
    """A file of contexts that other users can write is refused: they could direct keys to their own address."""
    file = tmp_path / "contexts.yaml"
    write_contexts(file, Contexts())
    file.chmod(0o620)
    with pytest.raises(ContextError, match="chmod 600"):
        read_contexts(file)


@pytest.mark.parametrize(
    ("parts", "part"),
    [
        ({"name": "local"}, "reserved"),
        ({"name": "a b"}, "letters"),
        ({"endpoint": "https://a:1"}, "--endpoint"),
        ({"endpoint": ""}, "--endpoint"),
        ({"admin": "a"}, "--admin"),
        ({"api_key_env": "hr_abcdef"}, "not a key"),
        ({"api_key_env": "A", "api_key_file": "/k"}, "one of them"),
    ],
)
def test_a_wrong_context_is_refused(parts: dict[str, str], part: str) -> None:
    """The error for an invalid context names the option. A key given in place of a variable's name is not printed."""
    with pytest.raises(ContextError, match=part) as error:
        ClusterContext(**{"name": "a", "endpoint": "b:1", **parts})
    assert "hr_abcdef" not in str(error.value)
